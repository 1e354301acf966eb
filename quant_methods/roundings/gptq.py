# SPDX-License-Identifier: Apache-2.0
"""Rounding with error compensation: later columns make up for the error of each column.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compress_common.errors import CompressError
from quant_methods.fp8 import converted, nearest_entries
from quant_methods.grid import Grid, QuantizedWeight, quantize, searched_shrink

_BLOCK = 64  # columns whose errors are applied to the rest of the matrix at once
_TRIES = 4


@dataclass(frozen=True)
class GPTQ:
    """Round columns in order, and let the columns that follow make up for the error of each.

    Groups and their ranges are fixed beforehand, so columns can be rounded in any order. A dead
    input is rounded to nearest.

    Args:
        order: "energy" rounds inputs with much energy first, while many columns are left to
            compensate. "stored": as the weight has them, as the paper does.
        ranges: "search" shrinks the range of a group where that lowers its error, weighted by the
            energy of the inputs. "minmax": the whole range.
        damp: Added to the diagonal of the Gram matrix, as a share of its mean. More damping follows
            the calibration text less closely. It is raised tenfold, up to three times, where the
            matrix is not positive definite.
    """

    order: Literal["energy", "stored"] = "energy"
    ranges: Literal["search", "minmax"] = "search"
    damp: float = 0.01

    name: ClassVar[str] = "gptq"
    needs_gram: ClassVar[bool] = True

    def round(
        self,
        weight: torch.Tensor,
        grid: Grid,
        gram: torch.Tensor | None = None,
        *,
        shrink: torch.Tensor | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedWeight:
        """See ``Rounding``. A given ``shrink`` replaces the search of ranges."""
        assert gram is not None, "GPTQ needs the Gram matrix of the inputs"
        energy = gram.diagonal()
        if shrink is None and self.ranges == "search":
            shrink = searched_shrink(weight, grid, energy, scale_dtype=scale_dtype)
        fixed = quantize(weight, grid, shrink=shrink, scale_dtype=scale_dtype)
        order = torch.arange(len(energy), device=gram.device)
        if self.order == "energy":
            order = energy.argsort(descending=True, stable=True)
        inverse = inverse_factor(gram[order][:, order], self.damp)
        # One column of the weight is one row here, so that each step works on whole rows.
        left = weight.float().t()[order]
        group = order // grid.width(weight.shape[1])
        scales, zeros = fixed.scale.t()[group], fixed.zero.t()[group]
        table = None
        if grid.activations == "fp8":
            per_group, per_channel = converted(fixed.scale)
            table = per_group.float().t()[group], per_channel[:, 0]
        signed = _compensated(left, inverse, scales, -zeros, grid.levels - 1 - zeros, table)
        codes = torch.empty_like(fixed.q)
        codes[:, order] = signed.add_(zeros).to(torch.uint8).t()
        return QuantizedWeight(codes, fixed.scale, fixed.zero, grid)


def _compensated(
    left: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the codes without their zero points, fp32 [K, N]. ``left`` is used up.

    Args:
        left: The weight, fp32 [K, N].
        inverse: ``inverse_factor`` of the inputs, [K, K].
        scales: Of each weight, [K, N].
        lowest: The smallest code without its zero point, [K, N].
        highest: The largest, [K, N].
        table: For FP8 activations the scales that the kernel makes: of each weight's group [K, N],
            and of each output channel [N].
    """
    codes = torch.empty_like(left)
    for begin in range(0, len(left), _BLOCK):
        end = min(begin + _BLOCK, len(left))
        errors = torch.empty_like(left[begin:end])
        for column in range(begin, end):
            value, scale, code = left[column], scales[column], codes[column]
            error = errors[column - begin]
            if table is None:
                torch.div(value, scale, out=code).round_()
                code.clamp_(lowest[column], highest[column])
                torch.addcmul(value, code, scale, value=-1, out=error)
            else:
                nearest, entries = nearest_entries(value, table[0][column], table[1])
                code.copy_(nearest)
                torch.sub(value, entries, out=error)
            error.div_(inverse[column, column])
            if column + 1 < end:
                left[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1)
        if end < len(left):
            left[end:].addmm_(inverse[begin:end, end:].t(), errors, alpha=-1)
    return codes


def inverse_factor(gram: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, fp32 [K, K].

    The Gram matrix is G = U U^T with an upper U, which is the lower factor of G turned by 180
    degrees. Then the inverse of U is the factor: half of the work of inverting G itself.

    Args:
        gram: [K, K].
        damp: As in ``GPTQ``.

    Raises:
        CompressError: The inputs are degenerate.
    """
    turned = gram.flip(0, 1)
    diagonal = turned.diagonal().clone()
    dead, mean = diagonal == 0, diagonal.mean()
    for attempt in range(_TRIES):
        # fp32 is enough unless the matrix is nearly singular.
        exact = turned.to(torch.float32 if attempt == 0 else torch.float64, copy=True)
        exact.diagonal().add_(damp * 10 ** max(attempt - 1, 0) * mean)
        exact.diagonal()[dead] = 1
        factor, failed = torch.linalg.cholesky_ex(exact)
        if not failed:
            unit = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
            inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
            if bool(torch.isfinite(inverse.diagonal()).all()):
                return inverse.flip(0, 1).float()
    raise CompressError(
        "the calibration inputs of a linear are degenerate, so gptq cannot invert them; give more "
        "or more varied calibration text, or use rounding=nearest"
    )
