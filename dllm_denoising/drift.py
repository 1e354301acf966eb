# SPDX-License-Identifier: Apache-2.0
"""How attention drifts, and which tokens get most of it. Pure functions over R padded requests.

Shapes::

    queries        [R, Hq, T, D]
    keys           [R, Hkv, N, D]
    probabilities  float32 [R, Hq, T, N]
    rows           bool [R, T], which rows are no padding
    there          bool [R, N], which keys are no padding

Heads can be spread over ranks. ``total`` then sums a tensor over the ranks, and ``heads`` is the
number of heads on all ranks.
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
    """Return softmax(q.k * scale) over the keys that are no padding."""
    requests, heads, count, width = queries.shape
    grouped = queries.float().reshape(requests, keys.shape[1], -1, width)
    logits = (grouped * scale @ keys.float().mT).view(requests, heads, count, -1)
    return logits.masked_fill_(~there[:, None, None], -torch.inf).softmax(-1)


def cosines(
    past: torch.Tensor,
    current: torch.Tensor,
    rows: torch.Tensor,
    there: torch.Tensor,
    over: Over,
    total: Total = _alone,
) -> torch.Tensor:
    """Return the sum of all cosines of past and current probabilities, float32 [R].

    Args:
        past: Probabilities before.
        current: Probabilities now.
        rows: Which rows count.
        there: Which keys count.
        over: "heads" takes a cosine over the heads, for each row and key. "row" takes a cosine over
            the keys, for each head and row.
        total: Sums a tensor over ranks.
    """
    pairs = ((past, current), (past, past), (current, current))
    if over == "heads":
        cosine = _cosine(*total(torch.stack([(x * y).sum(1) for x, y in pairs])))
        return cosine.masked_fill_(~(rows[:, :, None] & there[:, None]), 0).sum((1, 2))
    cosine = _cosine(*((x * y).sum(-1) for x, y in pairs))
    return total(cosine.masked_fill_(~rows[:, None], 0).sum((1, 2)))


def similarity(
    total_cosine: torch.Tensor, rows: torch.Tensor, there: torch.Tensor, over: Over, heads: int
) -> torch.Tensor:
    """Return the mean cosine, float32 [R], from the sum of ``cosines``; NaN without any row."""
    return total_cosine / (rows.sum(1).float() * (there.sum(1) if over == "heads" else heads))


def attention_mass(current: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return what each key gets of the attention of all rows and heads, float32 [R, N].

    With heads spread over ranks, sum the result over them.
    """
    return current.sum(1).masked_fill_(~rows[:, :, None], 0).sum(1)


def most_attended(mass: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ``count`` candidates with the largest mass, int64 [R, count].

    Args:
        mass: float32 [R, N], see ``attention_mass``.
        candidates: bool [R, N].
        count: How many. Where there are fewer candidates, the rest is -1.
    """
    mass = mass.masked_fill(~candidates, -1)
    best, place = mass.topk(min(count, mass.shape[1]), dim=1)
    place = place.where(best >= 0, -1)
    return torch.nn.functional.pad(place, (0, count - place.shape[1]), value=-1)


def _cosine(dot: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the cosine from a dot product and squared norms.

    Each norm has its own floor, because the product of both is tiny for many keys.
    """
    return dot / (left.sqrt().clamp(min=_EPS) * right.sqrt().clamp(min=_EPS))
