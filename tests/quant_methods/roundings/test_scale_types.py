# SPDX-License-Identifier: Apache-2.0
"""Scales are rounded to what the model is served in. float16 ends at 6e-8."""

import pytest
import torch

from compress_common.errors import CompressError
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
