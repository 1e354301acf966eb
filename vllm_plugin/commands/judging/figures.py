# SPDX-License-Identifier: Apache-2.0
"""Differences and shares with their standard errors. Imports neither torch nor vLLM."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


def token_nats(tokens: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    """Return the negative log-likelihood of each token.

    Args:
        tokens: Token ids.
        logprobs: vLLM's, of the same positions.
    """
    pairs = zip(tokens, logprobs, strict=True)
    return [-position[token].logprob for token, position in pairs]


def paired(
    nats: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> tuple[float, float | None]:
    """Return the mean difference per token of two models, and its standard error.

    The error is that of the means of windows. Tokens of one window depend on each other, so an
    error over tokens would be too small.

    Args:
        nats: Negative log-likelihood of each token of each window, all windows of one length.
        base: The same tokens, by the model that is compared with.

    Returns:
        The error is None with fewer than two windows.
    """
    means = [
        statistics.fmean(a - b for a, b in zip(window, others, strict=True))
        for window, others in zip(nats, base, strict=True)
    ]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return statistics.fmean(means), error


def recall(
    recalled: Sequence[bool], known: Sequence[bool]
) -> tuple[float | None, float | None, int]:
    """Return the share of what a full cache recalls that is recalled, and its standard error.

    The error is that of Agresti and Coull, who add two successes and two failures: "all of 16" is
    no proof of "always", and has an error above 0.

    Args:
        recalled: Whether each question was answered.
        known: Whether the full cache answered it.

    Returns:
        The share, its error, and how many the full cache recalls. None where that is none.
    """
    answered = [ours for ours, theirs in zip(recalled, known, strict=True) if theirs]
    if not (count := len(answered)):
        return None, None, 0
    smoothed = (sum(answered) + 2) / (count + 4)
    error = math.sqrt(smoothed * (1 - smoothed) / (count + 4))
    return sum(answered) / count, error, count
