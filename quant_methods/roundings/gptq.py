# SPDX-License-Identifier: Apache-2.0
"""Rounding with error compensation: later columns make up for the error of each column.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
https://arxiv.org/abs/2210.17323
"""

from functools import partial

import torch

from compress_common.errors import CompressError
from quant_methods.base import Progress, silent
from quant_methods.calibration.blocks import Blocks
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import codes_from_tensors, codes_to_tensors
from quant_methods.grid import Grid, QuantizedWeight, quantize

_BLOCK = 128  # columns whose errors are applied to the rest of the matrix at once
_DAMP = 0.01
_TRIES = 4


def gptq_quantize(
    weight: torch.Tensor,
    grid: Grid,
    hessian: torch.Tensor,
    *,
    shrink: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    damp: float = _DAMP,
) -> QuantizedWeight:
    """Round a weight so that its output error on the calibration inputs is small.

    Columns are rounded in order. The scale of a group comes from its weights as compensation has
    left them when its first column is reached. A dead input is rounded to nearest.

    Args:
        weight: [N, K].
        grid: How it is rounded.
        hessian: Mean outer product of the inputs, [K, K].
        shrink: As in ``quantize``, [N, K/group].
        scale_dtype: Scales are rounded to it.
        damp: Added to the diagonal, as a share of its mean. More damping follows the calibration
            text less closely. It is raised tenfold, up to three times, where the matrix is not
            positive definite.

    Raises:
        CompressError: The inputs are degenerate.
    """
    inverse = _inverse_factor(hessian, damp)
    left = weight.float().clone()
    codes = torch.empty_like(left)
    scales = left.new_empty(left.shape[0], left.shape[1] // grid.group_size)
    zeros = torch.empty_like(scales)
    for begin in range(0, left.shape[1], _BLOCK):
        end = min(begin + _BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, begin:end])
        for column in range(begin, end):
            group, within = divmod(column, grid.group_size)
            if within == 0:  # a group never crosses a block: both are powers of two up to 128
                rounded = quantize(
                    left[:, column : column + grid.group_size],
                    grid,
                    shrink=None if shrink is None else shrink[:, group : group + 1],
                    scale_dtype=scale_dtype,
                )
                scales[:, group], zeros[:, group] = rounded.scale[:, 0], rounded.zero[:, 0]
            scale, zero = scales[:, group], zeros[:, group]
            value = left[:, column]
            code = value.div(scale).round_().add_(zero).clamp_(0, grid.levels - 1)
            codes[:, column] = code
            error = (value - (code - zero) * scale) / inverse[column, column]
            left[:, column:end].addr_(error, inverse[column, column:end], alpha=-1)
            errors[:, column - begin] = error
        left[:, end:] -= errors @ inverse[begin:end, end:]
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros, grid)


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, fp32 [K, K]."""
    exact = hessian.double()
    diagonal = exact.diagonal()
    dead = diagonal == 0
    for attempt in range(_TRIES):
        damped = exact.clone()
        damped.diagonal().add_(damp * 10**attempt * diagonal.mean())
        damped.diagonal()[dead] = 1
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            return torch.linalg.cholesky(inverse, upper=True).float()
    raise CompressError(
        "the calibration inputs of a linear are degenerate, so gptq cannot invert them; give more "
        "or more varied calibration text, or use rounding=nearest"
    )


@torch.no_grad()
def compensate(plan: Plan, blocks: Blocks, progress: Progress = silent) -> None:
    """Round every linear of a plan with GPTQ, and put the codes into the plan.

    Blocks are rounded in order, each on the output of the quantized blocks before it. Memory beyond
    the model: fp32 [K, K] for the largest input of a block.

    Args:
        plan: Has folds and grids. Its ``codes`` are filled.
        blocks: The decoder, with calibration tokens.
        progress: Called for each block.
    """
    hidden = blocks.hidden
    for index in range(len(blocks)):
        progress("gptq", index + 1, len(blocks))
        prefix = blocks.prefix(index)
        linears = [name for name in plan.grids if name.startswith(prefix)]
        with blocks.resident(index) as block:
            kept = blocks.stages.tensors(
                f"gptq {index}", partial(_round_block, plan, blocks, index, hidden)
            )
            weights = {}
            for linear in linears:
                rounded = codes_from_tensors(linear, kept, plan.grids[linear])
                plan.codes[linear] = rounded
                name = linear.removeprefix(prefix)
                device = block.get_submodule(name).weight.device
                weights[name] = plan.unfolded(linear, rounded.to(device).dequantize())
            with blocks.replaced(index, weights):
                hidden = blocks.run(index, hidden)


def _round_block(
    plan: Plan, blocks: Blocks, index: int, hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Round the linears of a resident block. Returns their codes as a plan file stores them."""
    first_sharing = blocks.arch.first_sharing(blocks.model.config)
    dtype = torch.float16 if blocks.model.dtype == torch.float16 else torch.bfloat16
    prefix = blocks.prefix(index)
    names = [n.removeprefix(prefix) for n in plan.grids if n.startswith(prefix)]
    hessians: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2).float()
        hessians[name] = x.t() @ x / x.shape[0]

    with blocks.watch(index, tuple({first_sharing[name] for name in names}), see):
        blocks.run(index, hidden)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        linear = prefix + name
        weight = plan.smoothed(linear, blocks.layers[index].get_submodule(name).weight)
        hessian = hessians[first_sharing[name]]
        if (scale := plan.vectors.get(f"{linear}.input")) is not None:
            scale = scale.to(hessian.device)
            hessian = hessian / scale[:, None] / scale
        rounded = gptq_quantize(
            weight,
            plan.grids[linear],
            hessian,
            shrink=plan.shrink(linear, weight.device),
            scale_dtype=dtype,
        )
        tensors |= codes_to_tensors(linear, rounded.to("cpu"))
    return tensors
