# SPDX-License-Identifier: Apache-2.0
"""How attention drifts, and which tokens it goes to most. Pure functions over R padded requests::

    queries [R, Hq, T, D]   keys [R, Hkv, N, D]   probabilities [R, Hq, T, N], float32
    rows    bool [R, T]     which of T are there  there bool [R, N]

With heads spread over ranks, ``total`` sums a tensor over them; ``heads`` counts all heads.
"""

from collections.abc import Callable
from typing import Literal

import torch

Total = Callable[[torch.Tensor], torch.Tensor]
Over = Literal["heads", "row"]
_EPS = 1e-8


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x


def probabilities(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, there: torch.Tensor
) -> torch.Tensor:
    """softmax(q.k * scale) over the keys that are there."""
    requests, heads, count, width = queries.shape
    grouped = queries.float().reshape(requests, keys.shape[1], -1, width)
    logits = (grouped * scale @ keys.float().mT).view(requests, heads, count, -1)
    return logits.masked_fill_(~there[:, None, None], -torch.inf).softmax(-1)


def similarity(
    past: torch.Tensor,
    current: torch.Tensor,
    rows: torch.Tensor,
    there: torch.Tensor,
    over: Over,
    heads: int,
    total: Total = _alone,
) -> torch.Tensor:
    """Mean cosine of past and current probabilities, float32 [R]; NaN without any row.

    over: "heads" takes the cosine over heads, for each row and key, and the mean of these, "row"
    over the keys, for each head and row.
    """
    products = (past * current, past * past, current * current)
    counted = rows.sum(1).float()
    if over == "heads":
        cosine = _cosine(*total(torch.stack([x.sum(1) for x in products])))
        cosine = cosine.masked_fill(~(rows[:, :, None] & there[:, None]), 0)
        return cosine.sum((1, 2)) / (counted * there.sum(1))
    cosine = _cosine(*(x.sum(-1) for x in products)).masked_fill(~rows[:, None], 0)
    return total(cosine.sum((1, 2))) / (counted * heads)


def most_attended(
    current: torch.Tensor,
    rows: torch.Tensor,
    candidates: torch.Tensor,
    count: int,
    total: Total = _alone,
) -> torch.Tensor:
    """The ``count`` candidates, bool [R, N], that rows attend to most: int64 [R, count].

    -1 where there are fewer candidates.
    """
    mass = total(current.masked_fill(~rows[:, None, :, None], 0).sum((1, 2)))
    mass = mass.masked_fill(~candidates, -1)
    best, place = mass.topk(min(count, mass.shape[1]), dim=1)
    place = place.where(best >= 0, -1)
    return torch.nn.functional.pad(place, (0, count - place.shape[1]), value=-1)


def _cosine(dot: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """From squared norms. Each norm has its own floor: their product is tiny for many keys."""
    return dot / (left.sqrt().clamp(min=_EPS) * right.sqrt().clamp(min=_EPS))
