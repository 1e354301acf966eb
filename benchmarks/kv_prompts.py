# SPDX-License-Identifier: Apache-2.0
"""Prompts with something to remember, and windows of a book: tokens for ``kv_quality``."""

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.texts import opticks
from vllm_plugin.commands.judging import questions
from vllm_plugin.commands.judging.questions import Question, ask_for_keys, encode, hide

# Wordings of a key beside the pass key.
WORDINGS = tuple(name for name in questions.WORDINGS if name != "passkey")
NEEDLE = " The secret number of {} is {}. Remember it."
ASK_NEEDLE = " What is the secret number of {0}? The secret number of {0} is"
CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Tokyo", "Cairo")


@dataclass(frozen=True)
class Sizes:
    """Tokens of filler, depths (shares of it) of the pass key, needles per prompt, windows.

    prompts: of each length and depth, and of each length and needle.
    wordings: names of other wordings of the pass key, with as many prompts each.

    The first token of a continuation is predicted before anything is compacted: it is not judged.
    """

    lengths: tuple[int, ...] = (300, 600, 1200, 1800)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needle_lengths: tuple[int, ...] = (300, 500, 700, 900, 1100, 1300)
    needles: int = 4
    prompts: int = 3
    windows: int = 16
    context: int = 1000
    continuation: int = 65
    wordings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Material:
    """``questions`` by name: passkey, those of the wordings, needles."""

    questions: dict[str, list[Question]]
    windows: list[list[int]]


def material(model: Path, sizes: Sizes, seed: int) -> Material:
    """Everything, in the model's tokens. Prompts per length and depth; prompts per length and
    needle, with all needles in each and a question about one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(seed)
    places = list(product(sizes.lengths, sizes.depths)) * sizes.prompts
    keys = {
        wording: ask_for_keys(tokenizer, wording, places, draw)
        for wording in ("passkey", *sizes.wordings)
    }
    needles = []
    depths = [(index + 0.5) / sizes.needles for index in range(sizes.needles)]
    for _, length, asked in product(range(sizes.prompts), sizes.needle_lengths, range(len(depths))):
        cities = draw.sample(CITIES, sizes.needles)
        numbers = [str(number) for number in draw.sample(range(1000, 10_000), sizes.needles)]
        facts = [NEEDLE.format(*pair) for pair in zip(cities, numbers, strict=True)]
        ask = encode(tokenizer, ASK_NEEDLE.format(cities[asked]))
        told = hide(tokenizer, length, list(zip(depths, facts, strict=True)))
        needles.append(Question(told, ask, numbers[asked], length, depths[asked]))
    return Material(keys | {"needles": needles}, _windows(tokenizer, sizes))


def _windows(tokenizer: Any, sizes: Sizes) -> list[list[int]]:
    """Windows spread evenly over the second half of Newton's Opticks."""
    tokens = tokenizer.encode(opticks()[1])
    length = sizes.context + sizes.continuation
    stride = len(tokens) // sizes.windows
    if stride < length:
        raise ValueError(f"{len(tokens)} tokens are too few for {sizes.windows} windows")
    return [tokens[index * stride :][:length] for index in range(sizes.windows)]
