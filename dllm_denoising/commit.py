# SPDX-License-Identifier: Apache-2.0
"""Which predictions become tokens: the best few of a step, or all that are confident."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


def predict(
    logits: torch.Tensor, mask: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of each row's token and the token, float64 [M] and int64 [M].

    logits: [M, V]. mask: a token that is never predicted. noise: float64 [M, V], added to the
    logits for the choice, not for its probability (see ``gumbel``).
    """
    scores = logits.to(torch.float64, copy=True)
    scores[:, mask] = -torch.inf
    chosen = (scores if noise is None else scores + noise).argmax(-1)
    own = scores.gather(1, chosen[:, None])[:, 0]
    return (own - scores.logsumexp(-1)).exp(), chosen


def gumbel(shape: tuple[int, int], temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Noise that turns argmax into sampling at a temperature above 0. float64."""
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    tiny = torch.finfo(torch.float64).tiny
    return -temperature * (-(uniform.clamp(min=tiny).log())).clamp(min=tiny).log()


class CommitRule(Protocol):
    """Chooses among the predictions of a step; at least one, or denoising would never end."""

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        """Which of [M] predictions, M > 0, are committed: bool [M]."""
        ...


@dataclass(frozen=True)
class Fixed:
    """``count`` tokens per step, the most confident; more: fewer steps, more mistakes."""

    count: int

    def __str__(self) -> str:
        return f"the likeliest {self.count} of a step"

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        chosen = np.zeros(len(confidence), dtype=bool)
        chosen[np.argsort(-confidence, kind="stable")[: self.count]] = True
        return chosen


@dataclass(frozen=True)
class Threshold:
    """All with a probability of at least ``least``, and always the most confident one.

    Lower: more tokens per step, more mistakes (Fast-dLLM, https://arxiv.org/abs/2505.22618).
    """

    least: float

    def __str__(self) -> str:
        return f"what is at least {self.least} probable"

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        known = np.nan_to_num(confidence)  # of NaN logits: what is committed is no worse than they
        return known >= min(self.least, float(known.max()))
