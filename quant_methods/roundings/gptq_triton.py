# SPDX-License-Identifier: Apache-2.0
"""The inner loop of GPTQ as one launch for a block of columns.

Each column of a block waits for the one before it, and as single operations that is six launches a
column: 850,000 columns of an 8B model would take most of a minute. Output channels do not depend on
each other, so a program takes a few of them through all columns of the block.

Tested in Triton's interpreter and compiled for CUDA; never run on a GPU.
"""

import torch
import triton
import triton.language as tl

_CHANNELS = 32  # of a program: 2,048 weights of a block of 64 columns stay in registers
# Adding and taking away 1.5 * 2^23 rounds a small fp32 number to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _round_block(
    left,  # fp32 [count, n]: one column of the weight is one row here
    scales,  # fp32 [count, n]
    lowest,  # fp32 [count, n]
    highest,  # fp32 [count, n]
    inverse,  # fp32 [count, count], rows ``stride`` apart
    codes,  # out, fp32 [count, n]
    errors,  # out, fp32 [count, n]
    count,
    n,
    stride,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, COLUMNS)
    inside = channel < n
    at = column[:, None] * n + channel[None, :]
    weight = tl.load(left + at, mask=(column < count)[:, None] & inside[None, :], other=0.0)
    for index in range(count):
        here = index * n + channel
        value = tl.sum(tl.where(column[:, None] == index, weight, 0.0), axis=0)
        scale = tl.load(scales + here, mask=inside, other=1.0)
        low = tl.load(lowest + here, mask=inside, other=0.0)
        high = tl.load(highest + here, mask=inside, other=0.0)
        # Clamped first, so that the sum is exact. The limits are integers: the order is the same.
        code = tl.minimum(tl.maximum(tl.math.div_rn(value, scale), low), high)
        code = (code + _ROUND) - _ROUND
        row = tl.load(inverse + index * stride + column, mask=column < count, other=0.0)
        diagonal = tl.sum(tl.where(column == index, row, 0.0), axis=0)
        error = tl.math.div_rn(value - code * scale, diagonal)
        tl.store(codes + here, code, mask=inside)
        tl.store(errors + here, error, mask=inside)
        weight -= tl.where((column > index)[:, None], row[:, None] * error[None, :], 0.0)


def round_block(
    left: torch.Tensor,
    scales: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    inverse: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Round a block of columns, each after the errors of those before it.

    Args:
        left: The weight, fp32 [columns, N], dense.
        scales: Of each weight, as ``left``.
        lowest: The smallest code without its zero point, as ``left``.
        highest: The largest, as ``left``.
        inverse: The block on the diagonal of ``inverse_factor``, fp32 [columns, columns].
        codes: Takes the codes, as ``left``.
        errors: Takes what the columns behind the block have to make up for, as ``left``.
    """
    count, n = left.shape
    _round_block[(triton.cdiv(n, _CHANNELS),)](
        left,
        scales,
        lowest,
        highest,
        inverse,
        codes,
        errors,
        count,
        n,
        inverse.stride(0),
        COLUMNS=triton.next_power_of_2(count),
        CHANNELS=_CHANNELS,
    )
