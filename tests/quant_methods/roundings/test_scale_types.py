# SPDX-License-Identifier: Apache-2.0
"""Scales are rounded to what the model is served in. float16 ends at 6e-8."""

import pytest
import torch

from compress_common.errors import CompressError
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.packing import from_compressed_tensors, to_compressed_tensors
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid, fake_quantize, quantize, searched_shrink
from quant_methods.roundings.base import Rounding, output_error
from quant_methods.roundings.gptq import GPTQ
from quant_methods.roundings.nearest import Nearest


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ(), GPTQ("stored", "minmax")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_leaves_its_row_alone(
    rounding: Rounding, dtype: torch.dtype, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 128, generator=generator)
    x = torch.randn(512, 128, generator=generator)
    weight[1, :32] = 0
    gram = x.t() @ x / len(x)
    rounded = rounding.round(weight, Grid(32, symmetric), gram, scale_dtype=dtype)
    assert (rounded.scale > 0).all() and torch.equal(rounded.scale, rounded.scale.to(dtype).float())
    assert (rounded.dequantize()[1, :32].abs() < 1e-5).all()
    part = slice(1, 2)
    lost = output_error(weight[part], rounded.dequantize()[part], gram)
    assert lost < 0.02 * output_error(weight[part], torch.zeros(1, 128), gram)


def test_float16_holds_the_smallest_scales() -> None:
    """Where bfloat16 has steps, float16 rounds to zero or to its smallest number."""
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 1e-7
    rounded = quantize(weight, Grid(32), scale_dtype=torch.float16)
    assert torch.isfinite(rounded.zero).all() and (rounded.scale == 2.0**-24).all()
    assert ((rounded.dequantize() - weight).abs() <= 2.0**-24).all()


def test_a_scale_that_overflows_is_refused() -> None:
    weight = torch.full((1, 32), 1e6)
    assert torch.isfinite(quantize(weight, Grid(32)).scale).all()
    with pytest.raises(CompressError, match="too large for a scale in float16"):
        quantize(weight, Grid(32), scale_dtype=torch.float16)


def test_searches_round_scales_as_the_result_does() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grid = torch.randn(16, 128, generator=generator), Grid(32, bits=3)
    energy = torch.rand(128, generator=generator)
    shares = searched_shrink(weight, grid, energy, scale_dtype=torch.float16)
    assert not torch.equal(shares, searched_shrink(weight, grid, energy))
    rounded = quantize(weight, grid, shrink=shares, scale_dtype=torch.float16)
    assert torch.equal(fake_quantize(weight, grid, shares, torch.float16), rounded.dequantize())


@pytest.mark.parametrize("grid", [Grid(32), Grid(32, symmetric=True, bits=3)], ids=str)
def test_codes_of_bfloat16_keep_their_values_in_float16(grid: Grid) -> None:
    """``--dtype float16`` with a plan of codes. A group of tiny scale does not become zeros."""
    sizes = torch.logspace(-10, 2, 64).repeat_interleave(32)
    weight = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)) * sizes
    codes = quantize(weight, grid)  # scales in bfloat16
    assert (codes.scale < 2.0**-25).any() and (codes.scale > 1).any()
    plan = Plan("gptq", {"linear": grid}, codes={"linear": PackedWeight.of(codes)})
    served = plan.quantized("linear", weight, torch.float16)
    stored = to_compressed_tensors(served, torch.float16)
    scale = stored["weight_scale"]
    assert scale.dtype == torch.float16 and (scale > 0).all()
    if not grid.symmetric:
        assert torch.equal(from_compressed_tensors(stored, grid).dequantize(), served.dequantize())
    change = (served.dequantize() - codes.dequantize()).view(4, 64, 32)
    most = grid.levels * 2.0**-24  # codes that do not move, on a scale of the next step
    assert (change.abs() <= served.scale[..., None] / 2).all()
    assert (change.abs().amax(-1) <= torch.where(codes.scale < 2.0**-14, most, 0)).all()
    normal = codes.scale >= 2.0**-14
    assert torch.equal(served.q.view(4, 64, 32)[normal], codes.q.view(4, 64, 32)[normal])
    same = plan.quantized("linear", weight, torch.bfloat16)
    assert torch.equal(same.q, codes.q) and torch.equal(same.scale, codes.scale)
    large = Plan(
        "gptq", {"linear": grid}, codes={"linear": PackedWeight.of(quantize(weight * 1e6, grid))}
    )
    with pytest.raises(CompressError, match="too large for float16; serve with --dtype bfloat16"):
        large.quantized("linear", weight, torch.float16)
