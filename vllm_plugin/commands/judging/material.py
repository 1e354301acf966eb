# SPDX-License-Identifier: Apache-2.0
"""What an engine is judged on, in a model's tokens: questions for keys, and windows of a text."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compress_common.calibration.text_file import read_tokens
from compress_common.errors import CompressError
from vllm_plugin.commands.judging.questions import (
    WORDINGS,
    Question,
    ask_for_keys,
    beginning,
    encode,
)
from vllm_plugin.commands.judging.texts import reference

# Of a window, behind the prompt. The first is predicted before the prompt is compacted, so it is
# generated and not judged.
CONTINUATION: Final = 65
ROOM: Final = 128  # tokens of a key, a question and an answer
_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How much is judged.

    Attributes:
        context: tokens of a prompt, keys and questions not counted.
        windows: prompts whose continuation is judged.
        keys: prompts of each wording.
    """

    context: int = 768
    windows: int = 16
    keys: int = 4

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return self.context + max(ROOM, CONTINUATION)


@dataclass(frozen=True)
class Material:
    """Token ids. ``questions`` are by wording; a window is a prompt and its continuation."""

    questions: dict[str, list[Question]]
    windows: list[list[int]]
    context: int


def material(tokenizer: Any, text: Path | None, sizes: Sizes) -> Material:
    """Return what is judged. The keys are the same whenever it is called.

    Args:
        tokenizer: the model's.
        text: a .txt or .jsonl file; None: Python's language reference.
        sizes: how much.

    Raises:
        CompressError: the text cannot be read, or is too short.
    """
    draw = random.Random(_SEED)
    # Of half the length and of the whole in turns, at depths that are spread evenly.
    places = [
        (sizes.context if at % 2 else sizes.context // 2, (at + 0.5) / sizes.keys)
        for at in range(sizes.keys)
    ]
    questions = {wording: ask_for_keys(tokenizer, wording, places, draw) for wording in WORDINGS}
    return Material(questions, _windows(tokenizer, text, sizes), sizes.context)


def _windows(tokenizer: Any, text: Path | None, sizes: Sizes) -> list[list[int]]:
    ids = read_tokens(str(text), tokenizer) if text else encode(tokenizer, reference())
    first = beginning(tokenizer)
    length = sizes.context + CONTINUATION - len(first)
    if len(ids) < sizes.windows * length:
        raise CompressError(
            f"{text or 'the default text'} has {len(ids):,} tokens, {sizes.windows * length:,} are "
            f"needed ({sizes.windows} windows of {length:,}); give a longer text with --text, or "
            "lower --windows or --context"
        )
    stride = len(ids) // sizes.windows
    return [first + ids[at * stride :][:length] for at in range(sizes.windows)]
