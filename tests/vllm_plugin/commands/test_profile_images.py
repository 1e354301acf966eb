# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress profile --images``: the language model's layers, measured on whole chats."""

import base64
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress_common.errors import CompressError
from kv_policies.budget.levels import fractions_of, rounded
from kv_policies.budget.profile import load
from quant_methods.calibration.images import ImageSettings
from tests.support import wrapped
from vllm_plugin.commands.profiling.hf_images import HFImageModel
from vllm_plugin.commands.profiling.kv_profile import make_profile
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.settings import KVSettings

KEEP = Fraction(1, 4)


def chat(seed: int) -> dict[str, Any]:
    """A question about a picture, as the OpenAI API has it."""
    file = BytesIO()
    wrapped.picture(seed).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return {"messages": [{"role": "user", "content": content}]}


def with_template(folder: Path, family: str, image: str | None = None) -> Path:
    """Give a tiny model's processor a chat template, as published ones have."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        f"{wrapped.FAMILIES[family][4] if image is None else image}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Callable[..., Path]:
    def make(family: str, **options: Any) -> Path:
        folder = wrapped.make(family, tmp_path_factory.mktemp("model"), demo_model)
        return with_template(folder, family, **options)

    return make


@pytest.fixture(scope="module")
def llava(make: Callable[..., Path]) -> Path:
    return make("llava")


@pytest.mark.parametrize("family", ["llava", "qwen3 vl", "mistral3"])
def test_the_profile_is_that_of_the_whole_model(make: Callable[..., Path], family: str) -> None:
    """M-RoPE, features of images that are added in deeper layers, and the tower are in it."""
    folder, images = make(family), ImageSettings(samples=2)
    made, received = make_profile(str(folder), KEEP, images)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    subject, expected = HFImageModel(str(folder), images, 4), []
    for inputs in subject.inputs(whole, lambda *_: None):
        with torch.no_grad():
            dense = whole(**inputs, output_attentions=True).attentions
        expected.append(torch.stack([layer.float().mean(1).sum(1)[0] for layer in dense]))
        assert (inputs["input_ids"] == subject.config.wrapper.image_token_id).sum() >= 4
    for found, wanted in zip(received, expected, strict=True):  # in bfloat16 as served
        assert found.shape == wanted.shape and found.sum(1).tolist() == pytest.approx(
            [found.shape[1]] * 2, rel=0.02
        )
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    assert made.fractions == tuple(rounded(fractions_of(received, KEEP)))
    assert made.provenance.text == "pictures, seed 0" and made.provenance.samples == 2


def test_chats_of_a_file(run: Callable, llava: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(chat(n))}\n" for n in range(3)))
    options = ("--keep", "1/4", "--images", "chats.jsonl", "--samples", 3, "--out", "kv.json")
    code, output, errors = run("profile", llava, *options)
    assert code == 0, errors
    assert "attention kept" in output
    made = load("kv.json")
    assert made.layers == (0, 1) and made.keep == KEEP
    assert made.provenance.text == "chats.jsonl" and made.provenance.text_sha256
    assert 16 < made.provenance.sample_tokens < 32  # a picture is 16 tokens
    settings = KVSettings(policy="prefix_kv", profile=tmp_path / "kv.json")
    config = HFImageModel(str(llava), ImageSettings(), 4).config
    assert set(layouts_of(settings, 32, str(llava), config)) == {0, 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--images missing.jsonl", "image chats missing.jsonl is not a file; give 'made'"),
        ("--images bad.jsonl --samples 1", "bad.jsonl:1: messages[0]: cannot read none.png"),
        ("--images bad.jsonl", "bad.jsonl:1: messages[0]: cannot read none.png"),
        ("--images made --text bad.jsonl", "--images takes the place of a text"),
        ("--images made --length 64", "--images takes the place of a text"),
        ("--images made --samples 0", "--samples: "),
        ("--images made --keep 0.001", "picture 0 has"),
    ],
)
def test_bad_options_are_one_line(
    run: Callable, llava: Path, tmp_path: Path, options: str, expected: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": "none.png"}}
    bad = {"messages": [{"role": "user", "content": [image]}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
    code, output, errors = run("profile", llava, "--keep", 0.5, *options.split())
    assert code == 1 and not output
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert expected in line
    assert sorted(Path().iterdir()) == [Path("bad.jsonl")]


def test_models_that_cannot_be_measured_on_images_are_refused(
    make: Callable[..., Path], llava: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match="a model of text alone; leave --images out"):
        make_profile(str(tiny_model("llama")), KEEP, ImageSettings())
    with pytest.raises(CompressError, match="attention to later tokens"):  # within an image
        make_profile(str(make("gemma3")), KEEP, ImageSettings())
    with pytest.raises(CompressError, match="picture 0: the chat template leaves images out"):
        make_profile(str(make("llava", image="")), KEEP, ImageSettings())
    folder = tmp_path / "bare"
    shutil.copytree(llava, folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CompressError, match="no processor of images|cannot load the processor"):
        make_profile(str(folder), KEEP, ImageSettings())
