# SPDX-License-Identifier: Apache-2.0
"""Prompts for tests of the KV cache: real text of a given length, and needles in it."""

from functools import cache
from pathlib import Path
from typing import Any

from tests.support.child import ROOT


def text_prompts(model: Path, lengths: list[int]) -> list[list[int]]:
    """Token ids of running text, each prompt from another place."""
    ids = _tokens(model, (ROOT / "LICENSE").read_text(encoding="utf-8"))
    return [(ids[37 * number :] + ids)[:length] for number, length in enumerate(lengths)]


def needle_prompts(model: Path, count: int, tokens: int) -> list[list[int]]:
    """A pass key hidden in filler text, and the question after it."""
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    repeats = tokens // len(_tokens(model, filler))
    prompts = []
    for number in range(count):
        code = 41000 + 1371 * number
        before = 1 + number * (repeats - 2) // max(1, count - 1)
        text = filler * before + f"The pass key is {code}. Remember it. {code} is the pass key. "
        text += filler * (repeats - before) + "\nWhat is the pass key? The pass key is"
        prompts.append(_tokens(model, text))
    return prompts


def _tokens(model: Path, text: str) -> list[int]:
    return _tokenizer(model)(text, verbose=False)["input_ids"]


@cache
def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
