# SPDX-License-Identifier: Apache-2.0
"""Prompts with a key to remember, in several wordings, and a question for it at the end."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

# The demo model recalls what it read among these sentences; in a book it loses some of it.
FILLER: Final = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
# Ways to say a key, and to ask for it. Only the first says that it has to be remembered.
WORDINGS: Final = {
    "passkey": (
        " The pass key is {}. Remember it.",
        " What is the pass key? The pass key is",
    ),
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
ANSWER_TOKENS: Final = 12  # enough for a space and a number, whatever the tokenizer


@dataclass(frozen=True)
class Question:
    """What is told and asked, in token ids, and the digits that must come first in the answer.

    Attributes:
        told: filler with facts in it.
        ask: the question.
        answer: the digits.
        length: tokens of filler.
        depth: share of the filler in front of the fact that is asked for.
    """

    told: list[int]
    ask: list[int]
    answer: str
    length: int
    depth: float

    @property
    def prompt(self) -> list[int]:
        """The question behind what is told."""
        return self.told + self.ask


def ask_for_keys(
    tokenizer: Any, wording: str, places: Iterable[tuple[int, float]], draw: random.Random
) -> list[Question]:
    """Return one question for each place of a random key of five digits.

    Args:
        tokenizer: the model's.
        wording: of ``WORDINGS``.
        places: tokens of filler, and the share of them in front of the key.
        draw: chooses the keys.
    """
    fact, ask = WORDINGS[wording]
    questions = []
    for length, depth in places:
        key = str(draw.randrange(10_000, 100_000))
        told = hide(tokenizer, length, [(depth, fact.format(key))])
        questions.append(Question(told, encode(tokenizer, ask), key, length, depth))
    return questions


def hide(tokenizer: Any, length: int, facts: Sequence[tuple[float, str]]) -> list[int]:
    """Return ``length`` tokens of filler with each fact after its share of them.

    Args:
        tokenizer: the model's.
        length: tokens of filler.
        facts: the share of the filler in front of each, ascending, and the fact.
    """
    filler = encode(tokenizer, FILLER)
    filler = (filler * (length // len(filler) + 1))[:length]
    told, at = beginning(tokenizer), 0
    for depth, fact in facts:
        stop = int(depth * length)
        told += filler[at:stop] + encode(tokenizer, fact)
        at = stop
    return told + filler[at:]


def is_answered(text: str, answer: str) -> bool:
    """Whether the first number of a text is the answer."""
    number = re.search(r"\d+", text)
    return number is not None and number.group() == answer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return token ids of text that stands inside a prompt: no token begins or ends it."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def beginning(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer begins a prompt with, if there is one."""
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []
