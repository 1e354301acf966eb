# SPDX-License-Identifier: Apache-2.0
"""Chats with images from a JSONL file, as the OpenAI API has them. Errors name the line."""

import base64
import binascii
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from compress_common.calibration.text_file import read_file, shown
from compress_common.errors import CompressError

_HINT = "give 'made' or the path of a .jsonl file"

Row = tuple[str, list[dict[str, Any]], list[Any]]  # place, messages, images


def read_chats(path: Path, count: int, hashed: Callable[[bytes], object]) -> list[Row]:
    """Return chats that are spread evenly over a file.

    Args:
        path: A ``.jsonl`` file. Each line has ``messages``. Their content is a text, or a list of
            parts of type ``text`` and ``image_url``. A URL is a data URI, or a path from the folder
            of the file on. Nothing is downloaded.
        count: Of chats.
        hashed: Gets the bytes of the file and of its images.

    Returns:
        Of each chat its place, its messages with parts of type ``image`` for images, and these.

    Raises:
        CompressError: The file or an image cannot be read, a line is not as above, or there are too
            few lines.
    """
    text = read_file(path, "image chats", _HINT)
    hashed(text.encode())
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) < count:
        for number, line in lines:  # what is wrong with a line tells more than their number
            _chat(f"{path}:{number}", line, path.parent, hashed)
        raise CompressError(
            f"{path}: number of chats {len(lines)}, {count} are needed; give more, or lower the "
            "samples"
        )
    stride = (len(lines) - 1) / max(count - 1, 1)
    chosen = [lines[round(index * stride)] for index in range(count)]
    return [_chat(f"{path}:{number}", line, path.parent, hashed) for number, line in chosen]


def _chat(where: str, line: str, folder: Path, hashed: Callable[[bytes], object]) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CompressError(f"{where} is not JSON: {error.msg}") from error
    given = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(given, list) or not given:
        raise CompressError(f"{where} needs 'messages', a list of messages")
    messages, images = [], []
    for index, message in enumerate(given):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CompressError(
                f"{at} must be an object with 'role' and 'content', got {shown(message)}"
            )
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for number, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                images.append(_image(at, part.get("image_url"), folder, hashed))
                parts[number] = {"type": "image"}
            elif kind != "text" or not isinstance(part.get("text"), str):
                raise CompressError(
                    f"{at}: content is a string or parts of type 'text' and 'image_url', got "
                    f"{shown(part)}"
                )
        messages.append(message | {"content": parts})
    return where, messages, images


def _image(where: str, given: Any, folder: Path, hashed: Callable[[bytes], object]) -> Any:
    """The image of an ``image_url``."""
    from PIL import Image, UnidentifiedImageError

    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise CompressError(f"{where}: 'image_url' needs a 'url', got {shown(given)}")
    content = _content(where, url, folder)
    hashed(content)
    try:
        return Image.open(BytesIO(content)).convert("RGB")
    except UnidentifiedImageError as error:
        raise CompressError(f"{where}: {shown(url)} is not an image that Pillow knows") from error
    except Exception as error:  # Pillow raises many types for damaged files
        reason = str(error).strip() or type(error).__name__
        raise CompressError(f"{where}: {shown(url)} is not an image: {reason}") from error


def _content(where: str, url: str, folder: Path) -> bytes:
    if url.startswith("data:"):
        header, comma, body = url.partition(",")
        if not comma or not header.endswith(";base64"):
            raise CompressError(
                f"{where}: {shown(url)} is not a data URI in base64: data:image/png;base64,..."
            )
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise CompressError(f"{where}: {shown(url)} is not base64: {error}") from error
    url = url.removeprefix("file://")
    if "://" in url:
        raise CompressError(
            f"{where}: {shown(url)} would have to be downloaded; give a data URI or a local path"
        )
    try:
        return (folder / Path(url).expanduser()).read_bytes()
    except OSError as error:
        raise CompressError(f"{where}: cannot read {url}: {error.strerror}") from error
