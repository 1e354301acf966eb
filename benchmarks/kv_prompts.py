# SPDX-License-Identifier: Apache-2.0
"""Prompts with something to remember, and windows of a book: tokens for ``kv_quality``."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.texts import opticks

# The demo model recalls what it read among these sentences; in a book it loses some of it.
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
PASS_KEY = " The pass key is {}. Remember it."
ASK_PASS_KEY = " What is the pass key? The pass key is"
# Other ways to say and to ask for such a key: that it has to be remembered is not said.
WORDINGS = {
    "locker": (
        " Bob's locker combination: {}.",
        " What is Bob's locker combination? Bob's locker combination:",
    ),
    "record": (
        ' {{"user": "bob", "locker": "{}", "floor": 2}}',
        ' The record of bob again: {"user": "bob", "locker": "',
    ),
    "dialogue": (
        ' "What was the number of the taxi?" asked Anna. "It was {}," said Tom.',
        ' Anna asked Tom again for the number of the taxi. "The number of the taxi was',
    ),
}
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
class Question:
    """A prompt, and the digits that must come first in its continuation."""

    prompt: list[int]
    answer: str
    length: int
    depth: float


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
    known = {"passkey": (PASS_KEY, ASK_PASS_KEY)} | {n: WORDINGS[n] for n in sizes.wordings}
    questions: dict[str, list[Question]] = {name: [] for name in known}
    for name, (fact, ask) in known.items():
        for _, length, depth in product(range(sizes.prompts), sizes.lengths, sizes.depths):
            key = str(draw.randrange(10_000, 100_000))
            prompt = _hide(tokenizer, length, [(depth, fact.format(key))], ask)
            questions[name].append(Question(prompt, key, length, depth))
    needles = []
    depths = [(index + 0.5) / sizes.needles for index in range(sizes.needles)]
    for _, length, asked in product(range(sizes.prompts), sizes.needle_lengths, range(len(depths))):
        cities = draw.sample(CITIES, sizes.needles)
        numbers = [str(number) for number in draw.sample(range(1000, 10_000), sizes.needles)]
        facts = [NEEDLE.format(*pair) for pair in zip(cities, numbers, strict=True)]
        question = ASK_NEEDLE.format(cities[asked])
        prompt = _hide(tokenizer, length, list(zip(depths, facts, strict=True)), question)
        needles.append(Question(prompt, numbers[asked], length, depths[asked]))
    return Material(questions | {"needles": needles}, _windows(tokenizer, sizes))


def _hide(
    tokenizer: Any, length: int, facts: Sequence[tuple[float, str]], question: str
) -> list[int]:
    """``length`` tokens of filler with each fact after its share of them, and the question."""
    filler = tokenizer.encode(FILLER)
    filler = (filler * (length // len(filler) + 1))[:length]
    prompt: list[int] = []
    at = 0
    for depth, fact in facts:
        stop = int(depth * length)
        prompt += filler[at:stop] + tokenizer.encode(fact)
        at = stop
    return prompt + filler[at:] + tokenizer.encode(question)


def _windows(tokenizer: Any, sizes: Sizes) -> list[list[int]]:
    """Windows spread evenly over the second half of Newton's Opticks."""
    tokens = tokenizer.encode(opticks()[1])
    length = sizes.context + sizes.continuation
    stride = len(tokens) // sizes.windows
    if stride < length:
        raise ValueError(f"{len(tokens)} tokens are too few for {sizes.windows} windows")
    return [tokens[index * stride :][:length] for index in range(sizes.windows)]
