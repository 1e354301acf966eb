# SPDX-License-Identifier: Apache-2.0
"""Calibration chats with images: what is read, and what is refused by its line."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compress_common.errors import CompressError
from quant_methods.calibration.images import ImageSettings, image_chats, model_inputs


def png(color: str) -> bytes:
    file = BytesIO()
    Image.new("RGBA", (4, 6), color).save(file, "png")
    return file.getvalue()


def uri(color: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(color)).decode()}"


def chat(*urls: str, text: str = "What is this?") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def write(folder: Path, *rows: object) -> Path:
    file = folder / "chats.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("\n".join(lines) + "\n\n")
    return file


def test_images_are_data_uris_or_files_beside_the_chats(tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue"))
    spoken = {"messages": [{"role": "system", "content": "Be brief."}]}
    file = write(
        tmp_path,
        chat(uri("red"), "blue.png"),
        spoken,
        chat(f"file://{tmp_path / 'blue.png'}", text="And this?"),
    )
    chats, digest = image_chats(ImageSettings(source=str(file), samples=3))
    assert [len(one.images) for one in chats] == [2, 0, 1]
    pixels = [image.getpixel((0, 0)) for one in chats for image in one.images]
    assert pixels == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert chats[0].messages[0]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "What is this?"},
    ]
    assert chats[1].messages[0]["content"] == [{"type": "text", "text": "Be brief."}]
    # A changed image is another calibration.
    (tmp_path / "blue.png").write_bytes(png("green"))
    assert image_chats(ImageSettings(source=str(file), samples=3))[1] != digest


def test_chats_are_spread_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, *(chat(uri("red"), text=str(number)) for number in range(7)))
    chats, _ = image_chats(ImageSettings(source=str(file), samples=3))
    assert [one.messages[0]["content"][1]["text"] for one in chats] == ["0", "3", "6"]
    assert [one.where for one in chats] == [f"{file}:1", f"{file}:4", f"{file}:7"]


def test_pictures_are_made_where_none_are_given() -> None:
    chats, digest = image_chats(ImageSettings(samples=5))
    again, _ = image_chats(ImageSettings(samples=5))
    assert digest is None and len(chats) == 5
    looks = [one.images[0].tobytes() for one in chats]
    assert looks == [one.images[0].tobytes() for one in again] and len(set(looks)) == 5
    others, _ = image_chats(ImageSettings(samples=5, seed=1))
    assert looks[0] != others[0].images[0].tobytes()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["{"], ":1 is not JSON"),
        (['"text"'], ":1 needs 'messages'"),
        ([{"text": "a"}], ":1 needs 'messages'"),
        ([{"messages": []}], ":1 needs 'messages'"),
        ([{"messages": ["hello"]}], r"messages\[0\] must be an object"),
        ([{"messages": [{"role": "user", "content": 3}]}], "a string or parts of type"),
        ([{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}], "got .*audio"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
            "needs a 'url', got null",
        ),
        ([chat("https://example.com/a.png")], "would have to be downloaded; give a data URI"),
        ([chat("data:image/png,abc")], "is not a data URI in base64"),
        ([chat("data:image/png;base64,a?b")], "is not base64"),
        ([chat("data:image/png;base64,aGVsbG8=")], "is not an image"),
        ([chat("missing.png")], "cannot read missing.png: No such file"),
        ([chat(uri("red")[:-40] + "AAAA")], "is not"),
        ([chat()], "no chat of .* has an image; give it as --text"),
        ([], "number of chats 0, 1 are needed"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: list[Any], expected: str) -> None:
    file = write(tmp_path, *rows)
    with pytest.raises(CompressError, match=expected) as raised:
        image_chats(ImageSettings(source=str(file), samples=1))
    assert "chats.jsonl" in str(raised.value) and len(str(raised.value)) < 400


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path, expected in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "is not a file")):
        with pytest.raises(CompressError, match=f"{expected}.*'made' or the path of a .jsonl"):
            image_chats(ImageSettings(source=str(path), samples=1))


class Refusing:
    """What a processor can do to a chat."""

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no template\nset one")


def test_a_processor_that_refuses_is_quoted() -> None:
    (made,), _ = image_chats(ImageSettings(samples=1))
    with pytest.raises(CompressError, match="picture 0: the chat template refuses .*: no template"):
        model_inputs(made, Refusing(), 7)
