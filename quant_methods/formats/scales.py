# SPDX-License-Identifier: Apache-2.0
"""Codes that were rounded for scales of one type, served with scales of another."""

from dataclasses import replace

import torch

from compress_common.errors import CompressError
from quant_methods.grid import QuantizedWeight

_HELD = 2**-8  # relative change of a scale that both types round to


def with_scales_in(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """Return a weight whose scales a type holds, with nearly the same values.

    float16 has coarse steps below 6e-5 and nothing between 0 and 6e-8, so a group with a smaller
    bfloat16 scale would change or become zeros. Such a group gets the next larger scale, and the
    codes that are nearest to its values. Other groups stay as they are.

    Args:
        weight: Any grid. Weights for FP8 activations have scales of their own and pass.
        dtype: Of the served scales.

    Raises:
        CompressError: A scale is too large for the type.
    """
    scale = weight.scale
    cast = scale.to(dtype).float()
    if weight.grid.activations == "fp8" or torch.equal(cast, scale):
        return weight
    if not bool(torch.isfinite(cast).all()):
        kind = str(dtype).removeprefix("torch.")
        raise CompressError(f"a scale is too large for {kind}; serve with --dtype bfloat16")
    lost = (cast - scale).abs() > scale * _HELD
    if not bool(lost.any()):
        return weight
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps  # between the numbers near zero
    larger = torch.where(lost, (scale / step).ceil() * step, cast)
    rows, columns = weight.q.shape
    codes = weight.q.view(*scale.shape, columns // scale.shape[1]).float()
    zero = weight.zero[..., None]
    moved = (codes - zero).mul_((scale / larger)[..., None]).round_().add_(zero)
    q = torch.where(lost[..., None], moved, codes).to(torch.uint8).view(rows, columns)
    return replace(weight, q=q, scale=larger)
