# SPDX-License-Identifier: Apache-2.0
"""Channel smoothing as pure functions on vectors and matrices."""

from collections.abc import Callable, Iterable

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.structure.layer_structure import Fold
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid, searched_shrink

_FLOOR = 1e-5
_LIMIT = 1e4
# Percentages of the min/max range that the clip search tries.
CLIP_PERCENTS = (100, 93, 86, 79)


def smoothing_vector(amax: torch.Tensor, wmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``amax^alpha / wmax^(1-alpha)`` per channel, with a geometric mean of one.

    The mean keeps a folded norm in range. It changes no rounding, because a constant factor passes
    into the scale of every group.

    Args:
        amax: The largest |activation| of each channel, [K].
        wmax: The largest |weight| of each channel, [K].
        alpha: 0 flattens the weights alone, 1 moves the whole range of the activations into the
            weights.
    """
    log = alpha * amax.clamp(min=_FLOOR).log() - (1 - alpha) * wmax.clamp(min=_FLOOR).log()
    return (log - log.mean()).exp().clamp(1 / _LIMIT, _LIMIT)


def to_producer(fold: Fold, per_consumer_channel: torch.Tensor) -> torch.Tensor:
    """Return the largest value over the query heads that share a channel: [K] -> [K / repeat]."""
    if fold.repeat == 1:
        return per_consumer_channel
    return per_consumer_channel.view(-1, fold.repeat, fold.head_dim).amax(1).reshape(-1)


def to_consumer(fold: Fold, per_producer_channel: torch.Tensor) -> torch.Tensor:
    """Repeat the value of each producer channel for the query heads that it feeds."""
    if fold.repeat == 1:
        return per_producer_channel
    heads = per_producer_channel.view(-1, 1, fold.head_dim)
    return heads.expand(-1, fold.repeat, -1).reshape(-1)


def fold_into_norm(
    weight: torch.Tensor, scale: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm by a scale.

    Args:
        weight: Of the norm, [K].
        scale: [K].
        offset: 1 for norms that multiply by ``1 + weight`` (Gemma), else 0. bf16 is coarse near -1,
            so such a norm is not shrunk below 1/32.

    Returns:
        The weight to store, rounded to the norm's dtype, and the scale that it stands for, [K].
        The latter includes that rounding exactly, so only the rounding of linears changes the
        function.
    """
    total = weight.float() + offset
    if offset:
        scale = torch.minimum(scale, total.abs().clamp(min=_FLOOR) * 32)
    stored = (total / scale - offset).to(weight.dtype)
    realised = stored.float() + offset
    exact = (total != 0) & (realised != 0)
    return stored, torch.where(exact, total / realised.where(exact, 1), scale)


def add_fold(plan: Plan, blocks: Blocks, index: int, fold: Fold, vector: torch.Tensor) -> None:
    """Put the vector of a fold into a plan, under full tensor names.

    Args:
        plan: Takes it.
        blocks: The decoder.
        index: Of the block.
        fold: Where the vector goes.
        vector: By channel of the producer, [K / repeat].
    """
    prefix = blocks.prefix(index)
    if fold.from_norm:
        norm = blocks.layers[index].get_submodule(fold.producer)
        weight = norm.weight.to(blocks.dtype)  # type: ignore[operator, union-attr]
        stored, vector = fold_into_norm(weight, vector, fold.offset)
        plan.vectors[f"{prefix}{fold.producer}.weight"] = stored.float()
        if (bias := getattr(norm, "bias", None)) is not None:
            plan.vectors[f"{prefix}{fold.producer}.bias"] = bias.detach().float() / vector
    else:
        plan.vectors[f"{prefix}{fold.producer}.output"] = vector
    for consumer in fold.consumers:
        plan.vectors[f"{prefix}{consumer}.input"] = to_consumer(fold, vector)


def clip_percents(
    weight: torch.Tensor,
    grid: Grid,
    mean_square: torch.Tensor,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return the percentage of each group's range with the least output error, uint8 [N, K/g].

    Args:
        weight: [N, K].
        grid: How it is rounded.
        mean_square: Mean of the squared input per channel, [K]. It weighs the error.
        scale_dtype: Scales are rounded to it.
    """
    shares = [percent / 100 for percent in CLIP_PERCENTS]
    shrink = searched_shrink(weight, grid, mean_square, shares, scale_dtype)
    return shrink.mul_(100).round_().to(torch.uint8)


def search_alpha(
    loss: Callable[[float], float], step: float = 0.05, coarse: float = 0.2
) -> tuple[float, dict[float, float]]:
    """Minimize a loss over alpha in 0..1 on a grid.

    The search starts from 0.4 to 0.8, where alpha is for most models. It follows the best point if
    that is an end, and halves the distance around it.

    Args:
        loss: The loss of an alpha.
        step: Distance of the final grid.
        coarse: Distance of the first grid. ``coarse = step`` tries all points, as the paper does.

    Returns:
        The best alpha, and ``{alpha: loss}`` of all that were tried.
    """
    last = round(1 / step)
    stride = max(1, round(coarse / step))
    curve: dict[int, float] = {}

    def visit(points: Iterable[int]) -> int:
        for point in points:
            if 0 <= point <= last and point not in curve:
                curve[point] = loss(point * step)
        return min(curve, key=curve.__getitem__)

    best = visit(range(0, last + 1) if stride == 1 else range(2 * stride, last, stride))
    while stride > 1 and best in (min(curve), max(curve)) and 0 < best < last:
        best = visit([best - stride, best + stride])
    while stride > 1:
        stride //= 2
        best = visit([best - stride, best + stride])
    return round(best * step, 6), {round(p * step, 6): curve[p] for p in sorted(curve)}
