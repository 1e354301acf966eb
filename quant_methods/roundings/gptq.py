# SPDX-License-Identifier: Apache-2.0
"""Rounding with error compensation: later columns make up for the error of each column.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
https://arxiv.org/abs/2210.17323
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch

from compress_common.calibration.parts import row_parts
from compress_common.errors import CompressError
from quant_methods.fp8 import converted, nearest_entries
from quant_methods.grid import Grid, QuantizedWeight, quantize, searched_shrink

_BLOCK = 64  # columns whose errors are applied to the rest of the matrix at once
_TRIES = 4
_FACTOR_BLOCK = 256  # columns of a Gram matrix that are factored at once
_ELEMENTS = 1 << 23  # weights that a processor rounds at once, in whole rows
_TEMPORARIES = 7  # fp32 values that each takes meanwhile


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
            the calibration text less closely. None: see ``damping``. Where the matrix is not
            positive definite in fp32, it is tried in fp64 with the same damping, then with ten
            times and a hundred times as much.
    """

    order: Literal["energy", "stored"] = "energy"
    ranges: Literal["search", "minmax"] = "search"
    damp: float | None = None

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
        reuse_gram: bool = False,
        tokens: int | None = None,
    ) -> QuantizedWeight:
        """See ``Rounding``. A given ``shrink`` replaces the search of ranges."""
        assert gram is not None, "GPTQ needs the Gram matrix of the inputs"
        energy = gram.diagonal().clone()
        order = torch.arange(len(energy), device=gram.device)
        if self.order == "energy":
            order = energy.argsort(descending=True, stable=True)
        damp = damping(tokens) if self.damp is None else self.damp
        inverse = inverse_factor(permuted(gram, order, reuse_gram), damp)
        return QuantizedWeight.joined(
            [
                self._rounded(
                    weight[part],
                    grid,
                    energy,
                    order,
                    inverse,
                    None if shrink is None else shrink[part],
                    scale_dtype,
                )
                for part in row_parts(weight, _TEMPORARIES, _ELEMENTS)
            ]
        )

    def _rounded(
        self,
        weight: torch.Tensor,
        grid: Grid,
        energy: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        shrink: torch.Tensor | None,
        scale_dtype: torch.dtype,
    ) -> QuantizedWeight:
        """Round some rows.

        Args:
            weight: As in ``round``.
            grid: As in ``round``.
            energy: Mean square of each input, [K].
            order: In which columns are rounded, [K].
            inverse: ``inverse_factor`` of the inputs in that order.
            shrink: As in ``round``.
            scale_dtype: As in ``round``.
        """
        if shrink is None and self.ranges == "search":
            shrink = searched_shrink(weight, grid, energy, scale_dtype=scale_dtype)
        fixed = quantize(weight, grid, shrink=shrink, scale_dtype=scale_dtype)
        # One column of the weight is one row here, so that each step works on whole rows.
        left = weight.float().t()[order]
        codes = torch.empty_like(fixed.q)
        codes[:, order] = _compensated(left, inverse, fixed, order // grid.width(len(order))).t()
        return QuantizedWeight(codes, fixed.scale, fixed.zero, grid)


def _compensated(
    left: torch.Tensor, inverse: torch.Tensor, fixed: QuantizedWeight, group: torch.Tensor
) -> torch.Tensor:
    """Return the codes, uint8 [K, N]. ``left`` is used up.

    What a block of columns is rounded with is made for each block: for all of them at once it would
    take four times the memory of the weight.

    Args:
        left: The weight, fp32 [K, N].
        inverse: ``inverse_factor`` of the inputs, [K, K].
        fixed: Has the grid, and the scales and zero points of the groups.
        group: Of each input, [K].
    """
    table = converted(fixed.scale) if fixed.grid.activations == "fp8" else None
    fused = _fused() if left.is_cuda and table is None else None
    if fused is not None:
        left = left.contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for begin in range(0, len(left), _BLOCK):
        here, behind = slice(begin, begin + _BLOCK), slice(begin + _BLOCK, None)
        scales, zeros = (part.t()[group[here]].contiguous() for part in (fixed.scale, fixed.zero))
        limits = -zeros, fixed.grid.levels - 1 - zeros
        parts = left[here], scales, *limits, inverse[here, here]
        rounded, errors = torch.empty_like(scales), torch.empty_like(scales)
        if fused is not None:
            fused(*parts, rounded, errors)
        elif table is not None:
            entries = table[0].float().t()[group[here]], table[1][:, 0]
            _round_block(*parts, rounded, errors, entries)
        else:
            _round_block(*parts, rounded, errors, None)
        codes[here] = rounded.add_(zeros)
        if behind.start < len(left):
            left[behind].addmm_(inverse[here, behind].t(), errors, alpha=-1)
    return codes


def _round_block(
    left: torch.Tensor,
    scales: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    inverse: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Do what ``gptq_triton.round_block`` does. ``left`` is used up.

    Args:
        left: As there, and so are ``scales``, ``lowest``, ``highest``, ``inverse``, ``codes`` and
            ``errors``.
        scales: See ``left``.
        lowest: See ``left``.
        highest: See ``left``.
        inverse: See ``left``.
        codes: See ``left``.
        errors: See ``left``.
        table: For FP8 activations the scales that the kernel makes: of each weight's group, as
            ``scales``, and of each output channel [N]. None: activations are not FP8.
    """
    for column in range(len(left)):
        value, scale, code, error = left[column], scales[column], codes[column], errors[column]
        if table is None:
            torch.div(value, scale, out=code).round_()
            code.clamp_(lowest[column], highest[column])
            torch.addcmul(value, code, scale, value=-1, out=error)
        else:
            nearest, entries = nearest_entries(value, table[0][column], table[1])
            code.copy_(nearest)
            torch.sub(value, entries, out=error)
        error.div_(inverse[column, column])
        if column + 1 < len(left):
            left[column + 1 :].addr_(inverse[column, column + 1 :], error, alpha=-1)


@cache
def _fused() -> Callable[..., None] | None:
    """Return the kernel that rounds a block at once; None: Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from quant_methods.roundings.gptq_triton import round_block

    return round_block


def damping(tokens: int | None) -> float:
    """Return the damping that suits a number of calibration tokens: the fewer, the more.

    Of 0.01, 0.05, 0.15 and 0.4, 0.15 lost least with 2,048 tokens (0.10 nats against 0.14 with the
    0.01 that the paper's code has). With 8,192 tokens it made no difference.

    Args:
        tokens: See ``Rounding.round``.
    """
    if tokens is None:
        return 0.01
    return min(max(0.01, 0.15 * (2048 / tokens) ** 2), 0.3)


def permuted(gram: torch.Tensor, order: torch.Tensor, reuse: bool) -> torch.Tensor:
    """Return a Gram matrix [K, K] with rows and columns in another order.

    Args:
        gram: [K, K].
        order: [K].
        reuse: Whether the result takes the place of ``gram``.
    """
    if not reuse:
        return gram[order[:, None], order]
    for part in gram.split(_FACTOR_BLOCK):
        part.copy_(part[:, order])
    for part in gram.split(_FACTOR_BLOCK, dim=1):
        part.copy_(part[order])
    return gram


def inverse_factor(gram: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, fp32 [K, K].

    The Gram matrix is G = V V^T with an upper V, and the inverse of V is the factor. Both are
    computed in place, block by block: memory is that of ``gram``, unless G is so close to singular
    that fp64 is needed.

    Args:
        gram: [K, K]. Overwritten.
        damp: As in ``GPTQ``.

    Raises:
        CompressError: The inputs are degenerate.
    """
    diagonal = gram.diagonal().clone()
    dead, mean = diagonal == 0, diagonal.mean()
    for attempt in range(_TRIES):
        # fp32 is enough unless the matrix is nearly singular.
        exact = gram if attempt == 0 else gram.double()
        exact.diagonal().add_(damp * 10 ** max(attempt - 1, 0) * mean)
        exact.diagonal()[dead] = 1
        if _factor(exact):
            if torch.isfinite(_invert(exact.triu_()).diagonal()).all():
                return exact.float()
            break
        if attempt == 0:  # the lower triangle is as it was
            gram.tril_(-1)
            gram.add_(gram.t().clone())
            gram.diagonal().copy_(diagonal)
    raise CompressError(
        "the calibration inputs of a linear are degenerate, so gptq cannot invert them; give more "
        "or more varied calibration text, or use rounding=nearest"
    )


def _blocks(size: int) -> list[slice]:
    """The columns of a matrix in blocks, the last ones first."""
    return [slice(max(0, end - _FACTOR_BLOCK), end) for end in range(size, 0, -_FACTOR_BLOCK)]


def _factor(matrix: torch.Tensor) -> bool:
    """Replace the upper triangle of a symmetric A = V V^T by V. Returns whether A is positive.

    If it is not, the triangle has no meaning. The host waits for the device once, at the end.
    """
    positive = torch.ones((), dtype=torch.bool, device=matrix.device)
    for here in _blocks(len(matrix)):
        after, before = slice(here.stop, None), slice(0, here.start)
        rows = matrix[here, after]
        block = torch.addmm(matrix[here, here], rows, rows.t(), alpha=-1)
        block = block.triu() + block.triu(1).t()
        turned, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        positive &= (failed == 0) & torch.isfinite(turned.diagonal()).all()
        upper = turned.flip(0, 1)
        matrix[here, here] = upper + matrix[here, here].tril(-1)
        panel = torch.addmm(matrix[before, here], matrix[before, after], rows.t(), alpha=-1)
        matrix[before, here] = torch.linalg.solve_triangular(
            upper.t(), panel, upper=False, left=False
        )
    return bool(positive)


def _invert(matrix: torch.Tensor) -> torch.Tensor:
    """Invert an upper triangular matrix in place, and return it."""
    for here in _blocks(len(matrix)):
        after = slice(here.stop, None)
        rows = matrix[here, after] @ matrix[after, after]
        upper = matrix[here, here].clone()
        matrix[here, after] = torch.linalg.solve_triangular(upper, rows.neg_(), upper=True)
        unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        matrix[here, here] = torch.linalg.solve_triangular(upper, unit, upper=True)
    return matrix
