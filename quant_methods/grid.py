# SPDX-License-Identifier: Apache-2.0
"""Group-wise rounding of a weight matrix to 2 to 8 bits: pure functions in fp32.

A weight is ``[N, K]``: output by input channels. Each row is cut along K into groups of
``group_size`` channels. A group has one scale and, when asymmetric, one zero point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from compress_common.calibration.parts import row_parts
from compress_common.errors import CompressError
from quant_methods.fp8 import nearest_codes, served_scale, served_weight

GROUP_SIZES = (128, 64, 32)
SIXTEEN = 16  # bits of a weight that is left as it is
PER_CHANNEL = -1  # a group size: one scale for a whole row, as compressed-tensors and GPTQ write it
# How a served linear rounds its inputs, with one scale per token. "none": they stay at 16 bits.
Activations = Literal["none", "int8", "fp8"]
# fp32 values that rounding and the search of ranges make for each weight.
_TEMPORARIES = 6
# The scale of a group of zeros, where its type has one so small. Any positive number dequantizes it
# to zero.
_SCALE_FLOOR = 1e-8
# Shares of the min/max range of a group that a search tries.
SHARES = tuple(round(1 - 0.4 * step / 9, 3) for step in range(10))


@dataclass(frozen=True)
class Grid:
    """How one linear is rounded.

    Attributes:
        group_size: Input channels that share a scale; ``PER_CHANNEL``: all of a row.
        symmetric: Whether groups have no zero point.
        bits: Of a code, 2 to 8.
        activations: How the served linear rounds its inputs. "fp8" needs 4 bits and symmetric
            groups, and rounds scales as the kernel does: see ``fp8``.
    """

    group_size: int
    symmetric: bool = False
    bits: int = 4
    activations: Activations = "none"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"a grid has 2 to 8 bits, not {self.bits}")
        if self.activations == "fp8" and (self.bits != 4 or not self.symmetric):
            raise ValueError("FP8 activations need 4 bits and symmetric groups")

    @property
    def levels(self) -> int:
        """Number of codes: 16 with 4 bits."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 8 with 4 bits."""
        return self.levels // 2

    @property
    def packed(self) -> bool:
        """Whether checkpoints hold its codes packed into words; False: one int8 each, for w8a8."""
        return not (self.bits == 8 and self.activations == "int8")

    @property
    def on_cpu(self) -> bool:
        """Whether CPUs have kernels for it at all. Sizes and processors may rule them out."""
        return self.bits <= 4 if self.packed else self.activations == "int8"

    def groups(self, in_features: int) -> int:
        """Return the number of groups of a row."""
        return 1 if self.group_size == PER_CHANNEL else in_features // self.group_size

    def width(self, in_features: int) -> int:
        """Return the number of input channels of a group."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def stored_bits(self, in_features: int) -> float:
        """Return the bits that a weight takes in a checkpoint, scale and zero point included."""
        overhead = 16 + (0 if self.symmetric else self.bits)
        return self.bits + overhead / self.width(in_features)


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight ``(q - zero) * scale``.

    Attributes:
        q: Codes in 0..2^bits - 1, uint8 [N, K].
        scale: fp32 [N, K/group].
        zero: Zero points in 0..2^bits - 1, fp32 [N, K/group].
        grid: How it was rounded.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: Grid

    def to(self, device: str | torch.device) -> "QuantizedWeight":
        """Return the same weight on another device."""
        return QuantizedWeight(
            self.q.to(device), self.scale.to(device), self.zero.to(device), self.grid
        )

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Cut it along N into parts of so many rows."""
        parts = zip(self.q.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True)
        return [QuantizedWeight(q, scale, zero, self.grid) for q, scale, zero in parts]

    @classmethod
    def joined(cls, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Put parts of one grid below each other, along N."""
        if len(parts) == 1:
            return parts[0]
        q, scale, zero = zip(*((part.q, part.scale, part.zero) for part in parts), strict=True)
        return cls(torch.cat(q), torch.cat(scale), torch.cat(zero), parts[0].grid)

    def dequantize(self) -> torch.Tensor:
        """Return the weight that the codes stand for, fp32 [N, K]."""
        n, k = self.q.shape
        groups = self.q.view(n, self.scale.shape[1], -1).float()
        return _values(groups - self.zero[..., None], self.scale, self.grid).view(n, k)


def pick_group_size(in_features: int, cap: int = GROUP_SIZES[0]) -> int | None:
    """Return the largest of 128, 64, 32 that divides ``in_features`` and does not exceed ``cap``.

    Returns None when none does: every int4 kernel of vLLM needs whole groups.
    """
    sizes = (size for size in GROUP_SIZES if size <= cap and in_features % size == 0)
    return next(sizes, None)


def quantize(
    weight: torch.Tensor,
    grid: Grid,
    *,
    shrink: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Round a weight to the nearest points of a grid.

    The range of a group always includes zero, and codes are clamped, so neither a group of positive
    weights nor a .5 tie leaves 0..2^bits - 1.

    Args:
        weight: [N, K].
        grid: How it is rounded.
        shrink: Share of the min/max range that is kept, [N, K/group] in (0, 1]; None: all of it.
        scale_dtype: The scale is rounded to it first, because kernels read it so.

    Raises:
        CompressError: The weight is not finite, or is too large for the type of a scale.
    """
    codes, scale, zero = _round(weight, grid, shrink, scale_dtype)
    _check(torch.isfinite(scale).all(), weight, scale_dtype)
    codes = codes.add_(zero[..., None]).to(torch.uint8)
    return QuantizedWeight(codes.view(weight.shape), scale, zero, grid)


def fake_quantize(
    weight: torch.Tensor,
    grid: Grid,
    shrink: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return ``quantize(...).dequantize()``, fp32 [N, K], without the integer copy."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for part in row_parts(weight, _TEMPORARIES):
        codes, scale, zero = _round(
            weight[part], grid, None if shrink is None else shrink[part], scale_dtype
        )
        finite &= torch.isfinite(scale).all()
        out[part] = _values(codes, scale, grid).view(-1, weight.shape[1])
    _check(finite, weight, scale_dtype)
    return out


def searched_shrink(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor,
    shares: Sequence[float] = SHARES,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return the share of each group's range that gives the least error, fp32 [N, K/group].

    Args:
        weight: [N, K].
        grid: How it is rounded.
        importance: Weight of the squared error of each input channel, [K]: its mean square.
        shares: Those that are tried. On equal error the first wins.
        scale_dtype: Scales are rounded to it.
    """
    best = weight.new_empty(len(weight), grid.groups(weight.shape[1]), dtype=torch.float32)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    importance = importance.float().view(best.shape[1], -1)
    for part in row_parts(weight, _TEMPORARIES):
        groups = _grouped(weight[part], grid)
        low, whole = _range(groups, grid)
        found = torch.full_like(low, shares[0])
        least = torch.full_like(low, torch.inf)
        for share in shares:
            scale, zero = _scale(low * share, whole * share, grid, scale_dtype)
            finite &= torch.isfinite(scale).all()
            rounded = _values(_signed_codes(groups, scale, zero, grid), scale, grid)
            error = rounded.sub_(groups).square_().mul_(importance).sum(-1)
            found = torch.where(error < least, share, found)
            least = torch.minimum(error, least)
        best[part] = found
    _check(finite, weight, scale_dtype)
    return best


def _check(finite: torch.Tensor, weight: torch.Tensor, scale_dtype: torch.dtype) -> None:
    """Raise CompressError when scales are not finite. The host waits for the device here alone.

    A group with NaN or infinity has such a scale too.
    """
    if bool(finite):
        return
    if not bool(torch.isfinite(weight).all()):
        raise CompressError("a weight holds NaN or infinity; the checkpoint is damaged")
    kind = str(scale_dtype).removeprefix("torch.")
    raise CompressError(f"a weight has values too large for a scale in {kind}")


def _round(
    weight: torch.Tensor, grid: Grid, shrink: torch.Tensor | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes without zero points, fp32 [N, K/group, group]; scale and zero [N, K/group]."""
    groups = _grouped(weight, grid)
    low, whole = _range(groups, grid)
    if shrink is not None:
        low, whole = low * shrink, whole * shrink
    scale, zero = _scale(low, whole, grid, scale_dtype)
    return _signed_codes(groups, scale, zero, grid), scale, zero


def _grouped(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return a weight [N, K] as fp32 [N, K/group, group]."""
    return weight.float().reshape(len(weight), grid.groups(weight.shape[1]), -1)


def _range(groups: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest value of each group's range and the scale that covers it, [N, K/group]."""
    low, high = torch.aminmax(groups, dim=-1)
    if grid.symmetric:
        return low, torch.maximum(-low / grid.middle, high / (grid.middle - 1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    return low, (high - low) / (grid.levels - 1)


def _scale(
    low: torch.Tensor, scale: torch.Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales as they are served, and zero points, both [N, K/group].

    Where the range of a group is not finite, or too large for the type, the scale is not finite.
    """
    scale = scale.clamp(min=_floor(scale_dtype)).to(scale_dtype).float()
    if grid.activations == "fp8":
        scale = served_scale(scale)
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.middle)
    return scale, (-low / scale).round_().clamp_(0, grid.levels - 1)


def _signed_codes(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the nearest codes without their zero points, fp32 [N, K/group, group]."""
    if grid.activations == "fp8":
        return nearest_codes(groups, scale)
    lowest, highest = -zero[..., None], (grid.levels - 1 - zero)[..., None]
    return groups.div(scale[..., None]).round_().clamp_(lowest, highest)


def _values(codes: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what codes without zero points stand for, as [N, K/group, group]. ``codes`` may go."""
    if grid.activations == "fp8":
        return served_weight(codes, scale)
    return codes.mul_(scale[..., None])


def _floor(dtype: torch.dtype) -> float:
    """Return the smallest scale of a type: positive, so that nothing is divided by zero."""
    info = torch.finfo(dtype)
    return max(_SCALE_FLOOR, info.smallest_normal * info.eps)
