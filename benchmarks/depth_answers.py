# SPDX-License-Identifier: Apache-2.0
"""Questions with one right answer: sums, and a key hidden in a prompt. Nats hide their loss."""

import random
from typing import Any

import torch

from vllm_plugin.commands.judging.questions import ask_for_keys, encode

_SHOTS = "2 + 3 = 5\n4 + 1 = 5\n6 + 2 = 8\n3 + 6 = 9\n7 + 5 = 12\n8 + 8 = 16\n"
_PLACES = ((120, 0.3), (120, 0.7), (300, 0.5))


@torch.inference_mode()
def exact_answers(network: Any, tokenizer: Any, seed: int, count: int) -> dict[str, list[bool]]:
    """Return which questions are answered exactly, by kind.

    An answer is exact where greedy decoding gives each of its tokens.

    Args:
        network: A ``transformers`` model.
        tokenizer: Its tokenizer.
        seed: Of the questions.
        count: Of each kind.
    """
    draw = random.Random(seed)
    sums = []
    for _ in range(count):
        left, right = draw.randrange(1, 10), draw.randrange(1, 10)
        prompt = encode(tokenizer, f"{_SHOTS}{left} + {right} =")
        sums.append((prompt, encode(tokenizer, f" {left + right}\n")))
    places = [_PLACES[index % len(_PLACES)] for index in range(count)]
    keys = [
        (question.prompt, encode(tokenizer, f" {question.answer}"))
        for question in ask_for_keys(tokenizer, "passkey", places, draw)
    ]
    return {
        "arithmetic": [_exact(network, *question) for question in sums],
        "recall": [_exact(network, *question) for question in keys],
    }


def _exact(network: Any, prompt: list[int], answer: list[int]) -> bool:
    tokens = torch.tensor([prompt + answer], device=network.device)
    logits = network(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == answer
