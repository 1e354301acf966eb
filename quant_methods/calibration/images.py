# SPDX-License-Identifier: Apache-2.0
"""Calibration chats that hold images: from a JSONL file, or about pictures that are drawn here."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from compress_common.errors import CompressError
from quant_methods.calibration.image_file import read_chats

MADE: Final = "made"
_SIZE: Final = 448  # pixels of a side of a picture that is drawn
_SHAPES: Final = 24  # in such a picture
_QUESTIONS: Final = (
    "Describe this picture in detail.",
    "What is in the middle of the picture?",
    "Which colors do you see, and where?",
    "List what is in the upper left corner.",
)


class ImageSettings(BaseModel):
    """Where calibration chats with images come from and how many are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        MADE,
        description="'made' (questions about pictures of random shapes: no data set) or the path "
        "of a .jsonl file with 'messages' per line, images in parts of type 'image_url'",
    )
    samples: int = Field(4, ge=1, le=4096, description="chats; more: slower, steadier")
    seed: int = Field(0, ge=0, description="seed of the pictures")


@dataclass(frozen=True)
class ImageChat:
    """One chat.

    Attributes:
        where: For messages: a file and its line, or the number of a picture.
        messages: For a chat template. Parts of type "image" stand for the images, in their order.
        images: PIL images, RGB.
    """

    where: str
    messages: list[dict[str, Any]]
    images: list[Any]


def image_chats(settings: ImageSettings) -> tuple[list[ImageChat], str | None]:
    """Return ``settings.samples`` chats, and the SHA-256 of a file and its images.

    A file with more chats gives some that are spread evenly over it.

    Raises:
        CompressError: The file or an image cannot be read, or there are too few chats.
    """
    if settings.source == MADE:
        return [_made(settings.seed, number) for number in range(settings.samples)], None
    path = Path(settings.source).expanduser()
    digest = hashlib.sha256()
    chats = [ImageChat(*row) for row in read_chats(path, settings.samples, digest.update)]
    if not any(chat.images for chat in chats):
        raise CompressError(f"no chat of {path} that is used has an image; give it as --text")
    return chats, digest.hexdigest()


def model_inputs(chat: ImageChat, processor: Any, image_token: int | None) -> dict[str, Any]:
    """Return what a ``transformers`` model takes of a chat, as a server would prepare it.

    Args:
        chat: Its question is not answered yet.
        processor: The model's own.
        image_token: Id of the token that stands for images; None: not known.

    Raises:
        CompressError: The chat template or the processor refuses the chat, or leaves images out.
    """
    document = _told(
        f"{chat.where}: the chat template refuses the messages",
        lambda: processor.apply_chat_template(
            chat.messages, add_generation_prompt=True, tokenize=False
        ),
    )
    inputs = _told(
        f"{chat.where}: the processor refuses the chat",
        lambda: processor(
            images=chat.images or None,
            text=document,
            add_special_tokens=False,  # the template has written them
            return_tensors="pt",
        ),
    )
    seen = image_token is None or bool((inputs["input_ids"] == image_token).any())
    if chat.images and not seen:
        raise CompressError(
            f"{chat.where}: the chat template leaves images out; take the chat_template.jinja that "
            "the model was published with"
        )
    return dict(inputs)


def _told(problem: str, step: Callable[[], Any]) -> Any:
    """Return what a step returns, or say what it could not do."""
    try:
        return step()
    except Exception as error:  # whatever a template or a processor raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CompressError(f"{problem}: {reason}") from error


def _made(seed: int, number: int) -> ImageChat:
    """A question about a picture of random shapes."""
    import random

    from PIL import Image, ImageDraw

    source = random.Random(f"{seed} {number}")

    def color() -> tuple[int, ...]:
        return tuple(source.randrange(256) for _ in range(3))

    image = Image.new("RGB", (_SIZE, _SIZE), color())
    draw = ImageDraw.Draw(image)
    for _ in range(_SHAPES):
        left, top = (source.randrange(_SIZE) for _ in range(2))
        right, bottom = (start + source.randrange(8, _SIZE // 3) for start in (left, top))
        source.choice((draw.rectangle, draw.ellipse))((left, top, right, bottom), fill=color())
    question = _QUESTIONS[number % len(_QUESTIONS)]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return ImageChat(f"picture {number}", [{"role": "user", "content": content}], [image])
