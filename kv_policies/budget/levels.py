# SPDX-License-Identifier: Apache-2.0
"""How much each layer keeps: exact budgets in rational numbers, and their cut into levels.

A *fraction* is the share of its tokens that a layer KEEPS, as an exact ``Fraction`` in (0, 1]. The
budget is the mean of the fractions over layers. Every function here preserves it exactly. Blocks
are rounded up later, per segment and layer (``TokenLayout.kept``), so memory exceeds the budget by
less than one block per segment and layer, apart from ``min_blocks``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from compress_common.errors import CompressError

# vLLM pads groups of layers to one size and refuses to pad by half or more.
_MAX_LEVELS = 8
_MIN_LEVELS = 3


def uniform(layers: int, keep: Fraction) -> list[Fraction]:
    """The same fraction for every layer."""
    return [keep] * layers


def mass_beyond(attention: torch.Tensor) -> torch.Tensor:
    """Share of a layer's attention that its o most attended tokens leave out, o = 0 .. T-1.

    Args:
        attention: Attention that each token received, [L, T]. Every row needs a positive sum.

    Returns:
        float64 [L, T], non-increasing; the first column is 1.
    """
    mass = attention.double()
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        raise CompressError("attention must be finite and not negative")
    if bool((mass.sum(-1) <= 0).any()):
        raise CompressError("every layer needs some attention; a row is all zero")
    ordered = mass.sort(dim=-1).values
    # Summed from the smallest up: 1 - cumsum from the largest would saturate in long prompts.
    tail = ordered.cumsum(-1).flip(-1)
    return tail / tail[:, :1]


def water_fill(attention: torch.Tensor, total: int) -> torch.Tensor:
    """Tokens per layer for one common level of cumulative attention: int64 [L], sum == total.

    PrefixKV (https://arxiv.org/abs/2412.03409): layer l keeps its R_l most attended tokens, with
    ``R_l = min{o : P_l(o) >= p}``, P_l the cumulative share of its attention, and one p for all
    layers. There is no search for p. The tokens of all layers are put in the order in which a
    rising p takes them, and the first ``total`` are taken, which is exact and monotone in
    ``total``. Equal levels are taken by rank in their layer, then by layer. Each layer gets at
    least one token.

    Args:
        attention: Attention that each token received, [L, T], sink and last token included.
        total: Tokens over all layers, from L to L * T.
    """
    layers, tokens = attention.shape
    if not layers <= total <= layers * tokens:
        raise CompressError(
            f"a budget of {total} tokens does not fit {layers} layers of {tokens} tokens: "
            f"from {layers} to {layers * tokens} do"
        )
    # Token o of a layer is taken as soon as p exceeds P_l(o - 1), the share without it.
    beyond = mass_beyond(attention).T.reshape(-1)  # by rank in the layer, then by layer
    order = beyond.sort(descending=True, stable=True).indices
    return torch.bincount(order[:total] % layers, minlength=layers)


def fractions_of(samples: Sequence[torch.Tensor], keep: Fraction) -> list[Fraction]:
    """Per-layer fractions from calibration samples; their mean is exactly ``keep``.

    Each sample is water-filled alone, and the fractions are averaged (the paper's offline mode).

    Args:
        samples: Attention received, [L, T_s] per sample; lengths can differ.
        keep: The mean of the fractions.
    """
    if not samples:
        raise CompressError("a profile needs at least one calibration sample")
    layers = samples[0].shape[0]
    sums = [Fraction(0)] * layers
    for attention in samples:
        tokens = attention.shape[1]
        budget = keep * layers * tokens
        if budget < layers:
            raise CompressError(
                f"keep {keep} of a sample of {tokens} tokens is less than one token; "
                f"use samples of at least {math.ceil(1 / keep)} tokens"
            )
        counts = [Fraction(count) for count in water_fill(attention, math.floor(budget)).tolist()]
        # What is left is less than one token over all layers: shared by those that have room.
        room = [index for index, count in enumerate(counts) if count < tokens]
        for index in room:
            counts[index] += (budget - math.floor(budget)) / len(room)
        sums = [total + count / tokens for total, count in zip(sums, counts, strict=True)]
    return [total / len(samples) for total in sums]


def retained(attention: torch.Tensor, fractions: Sequence[Fraction]) -> float:
    """Mean over layers of the share of attention that the most attended tokens hold, 0 to 1.

    Args:
        attention: Attention that each token received, [L, T].
        fractions: Per layer. A fraction f counts the ``floor(f * T)`` best tokens.
    """
    beyond = mass_beyond(attention)
    beyond = torch.cat([beyond, beyond.new_zeros(len(beyond), 1)], dim=1)
    counts = [math.floor(fraction * attention.shape[1]) for fraction in fractions]
    left_out = beyond.gather(1, torch.tensor(counts, device=beyond.device)[:, None])
    return 1.0 - float(left_out.mean())


@dataclass(frozen=True)
class Levels:
    """Per-layer fractions cut into few levels: layers of one level share a KV-cache group.

    Attributes:
        fractions: One per level, ascending.
        level_of: The level of each layer.
        padded_layers: Memory, in layers, that is lost because the levels are not equally large.
        moved: The cost: mean over layers of |level's fraction - the layer's own|, 0 for none.
    """

    fractions: tuple[Fraction, ...]
    level_of: tuple[int, ...]
    padded_layers: int
    moved: Fraction

    @property
    def per_layer(self) -> list[Fraction]:
        """The fraction of each layer after the cut."""
        return [self.fractions[level] for level in self.level_of]


def pick_levels(layers: int) -> int:
    """The number of levels to use: 3 to 8, the largest that divides the layers.

    If none divides them (26, 31 layers), it is the one that wastes least memory by padding. Fewer
    than three layers have one level each.
    """
    if layers < _MIN_LEVELS:
        return layers
    usable = [count for count in range(_MIN_LEVELS, _MAX_LEVELS + 1) if _even_enough(layers, count)]
    return max(usable, key=lambda count: (-_padding(layers, count), count))


def _padding(layers: int, levels: int) -> int:
    return -layers % levels


def _even_enough(layers: int, levels: int) -> bool:
    """vLLM makes one group per level only if the largest is less than 1.5 times the smallest."""
    smallest = layers // levels
    return smallest > 0 and (layers % levels == 0 or smallest > 2)


def quantize(fractions: Sequence[Fraction], levels: int | None = None) -> Levels:
    """Cut per-layer fractions into levels of equal layer count. Their sum is preserved exactly.

    Layers are ordered by fraction (equal ones by index) and cut into runs. A run's fraction is its
    mean, so the squared change is the least for these runs. If ``levels`` does not divide the
    layers, sizes differ by one, and the levels that keep most have fewer layers.

    Args:
        fractions: Per layer.
        levels: How many, 1 to 8; None: ``pick_levels``.
    """
    layers = len(fractions)
    levels = pick_levels(layers) if levels is None else levels
    if not 1 <= levels <= _MAX_LEVELS or not _even_enough(layers, levels):
        valid = [n for n in range(1, _MAX_LEVELS + 1) if _even_enough(layers, n)]
        raise CompressError(
            f"{layers} layers cannot be cut into {levels} levels of (nearly) equal size; "
            f"possible: {', '.join(map(str, valid))}"
        )
    order = sorted(range(layers), key=lambda index: fractions[index])
    level_of = [0] * layers
    means = []
    start = 0
    for level in range(levels):
        stop = start + layers // levels + (level < layers % levels)
        run = order[start:stop]
        for index in run:
            level_of[index] = level
        means.append(sum((fractions[index] for index in run), Fraction(0)) / len(run))
        start = stop
    moved = sum((abs(means[v] - f) for v, f in zip(level_of, fractions, strict=True)), Fraction(0))
    return Levels(tuple(means), tuple(level_of), _padding(layers, levels), moved / layers)


def rounded(fractions: Sequence[Fraction], units: int = 1000) -> list[Fraction]:
    """The fractions in multiples of ``1 / units``, or of a whole part of it, with the same sum.

    Averages over samples have huge denominators, and a profile should be readable. ``units`` is
    multiplied by what it takes to write the sum exactly. Each fraction is rounded by less than one
    unit (largest remainders up) if none is below one unit, and stays in (0, 1].
    """
    total = sum(fractions, Fraction(0))
    units *= (total * units).denominator
    counts = [max(1, math.floor(fraction * units)) for fraction in fractions]
    left = int(total * units) - sum(counts)
    if left >= 0:
        order = sorted(
            range(len(fractions)), key=lambda index: counts[index] - fractions[index] * units
        )
        for index in order[:left]:
            counts[index] += 1
    else:  # the floor of one unit took too much: give back from the largest
        for _ in range(-left):
            counts[counts.index(max(counts))] -= 1
    return [Fraction(count, units) for count in counts]
