# SPDX-License-Identifier: Apache-2.0
"""Rules that decide which predictions of a step become tokens."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


def predict(
    logits: torch.Tensor, mask: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's token.

    The probability is computed from the sum over all other tokens. In float32 that sum is exact to
    six digits even where the probability is so close to 1 that float32 cannot tell it from 1, so
    that rows keep their order of confidence.

    Args:
        logits: [M, V], of any floating-point type. Not changed.
        mask: A token that is never predicted.
        noise: float32 [M, V], added to the logits for the choice but not for its probability (see
            ``gumbel``). It is overwritten.

    Returns:
        The probability of each row's token, float64 [M], and the token, int64 [M].
    """
    scores = logits.to(torch.float32, copy=True)
    scores[:, mask] = -torch.inf
    chosen = (scores if noise is None else noise.add_(scores)).argmax(-1, keepdim=True)
    odds = scores.sub_(scores.gather(1, chosen)).exp_().scatter_(1, chosen, 0).sum(-1)
    return 1 / (1 + odds.double()), chosen[:, 0]


def gumbel(shape: tuple[int, int], temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Return noise that turns argmax into sampling at a temperature above 0, float32.

    It is drawn in float64: uniform numbers of 24 bits would cut the tail of the distribution, and
    tokens of a small probability would never be sampled (https://arxiv.org/abs/2409.02908). Rows
    that are drawn in several calls are the same as rows of one call.
    """
    noise = torch.rand(shape, dtype=torch.float64, generator=generator)
    tiny = torch.finfo(torch.float64).tiny
    noise.clamp_(min=tiny).log_().neg_().clamp_(min=tiny).log_().mul_(-temperature)
    return noise.float()


class CommitRule(Protocol):
    """Chooses among the predictions of a step.

    A rule must choose at least one, or denoising would never end.
    """

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        """Return which predictions are committed, bool [M].

        Args:
            confidence: Probability of each prediction, float64 [M], M > 0.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """Commits the ``count`` most confident tokens. More means fewer steps and more mistakes."""

    count: int

    def __str__(self) -> str:
        return f"the likeliest {self.count} of a step"

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        chosen = np.zeros(len(confidence), dtype=bool)
        chosen[np.argsort(-confidence, kind="stable")[: self.count]] = True
        return chosen


@dataclass(frozen=True)
class Threshold:
    """Commits all tokens with a probability of at least ``least``, and always the best one.

    Lower means more tokens per step and more mistakes (Fast-dLLM,
    https://arxiv.org/abs/2505.22618).
    """

    least: float

    def __str__(self) -> str:
        return f"what is at least {self.least} probable"

    def choose(self, confidence: np.ndarray) -> np.ndarray:
        known = np.nan_to_num(confidence)  # NaN logits must not keep a step from committing
        return known >= min(self.least, float(known.max()))
