# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from compress_common.checkpoints.identity import tensor_digest
from compress_common.errors import CompressError
from compress_common.store import digest
from quant_methods.base import GridSettings
from quant_methods.grid import (
    GROUP_SIZES,
    PER_CHANNEL,
    Grid,
    fake_quantize,
    pick_group_size,
    quantize,
)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, "self_attn.o_proj", *GATE_UP, DOWN)

grids = st.builds(
    Grid, st.sampled_from([*GROUP_SIZES, PER_CHANNEL]), st.booleans(), st.integers(2, 8)
)


@st.composite
def weights(draw) -> torch.Tensor:
    """[N, 256] of many magnitudes: centered, all positive, all negative, zero, with outliers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(draw(st.integers(1, 5)), 256, generator=generator)
    weight = weight * 10.0 ** draw(st.integers(-6, 3)) + draw(st.sampled_from([0.0, 1.0, -1.0]))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, 255))] *= 100
    return weight * draw(st.sampled_from([0.0, 1.0]))


@given(weights(), grids)
@settings(deadline=None, max_examples=150)
def test_codes_stay_in_range_and_error_is_half_a_step(weight: torch.Tensor, grid: Grid) -> None:
    rounded = quantize(weight, grid, scale_dtype=torch.float32)
    assert rounded.q.dtype == torch.uint8
    assert int(rounded.q.max()) < grid.levels
    assert (rounded.zero >= 0).all()
    assert (rounded.zero < grid.levels).all()
    step = rounded.scale.repeat_interleave(grid.width(weight.shape[1]), dim=1)
    # Half a step from rounding, half a step from the rounded zero point at the ends of the range.
    assert ((rounded.dequantize() - weight).abs() <= step * 1.001 + 1e-7).all()


@given(weights(), grids)
@settings(deadline=None, max_examples=50)
def test_fake_quantize_is_quantize_then_dequantize(weight: torch.Tensor, grid: Grid) -> None:
    assert torch.equal(fake_quantize(weight, grid), quantize(weight, grid).dequantize())


def test_all_positive_group_does_not_overflow() -> None:
    """The published loader gives codes of 75 to 90 for weights between 1.0 and 1.2."""
    weight = torch.linspace(1.0, 1.2, 32).view(1, 32)
    rounded = quantize(weight, Grid(32))
    assert rounded.q.max() == 15
    assert (rounded.dequantize() - weight).abs().max() <= 1.2 / 15 / 2 * 1.01


def test_zero_survives_exactly() -> None:
    weight = torch.cat([torch.zeros(1, 16), torch.rand(1, 16) + 0.5], dim=1)
    assert (quantize(weight, Grid(32)).dequantize()[0, :16] == 0).all()


def test_a_weight_on_the_grid_is_reproduced() -> None:
    codes = torch.arange(16).repeat(4, 4).float()
    weight = (codes - 5) * 0.25
    assert torch.equal(quantize(weight, Grid(64)).dequantize(), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight_is_refused(bad: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = bad
    with pytest.raises(CompressError, match="NaN or infinity"):
        quantize(weight, Grid(64))


@pytest.mark.parametrize(("size", "expected"), [(576, 64), (1536, 128), (2048, 128), (96, 32)])
def test_pick_group_size(size: int, expected: int) -> None:
    assert pick_group_size(size) == expected
    assert pick_group_size(size, 32) == 32


def test_no_group_size_fits() -> None:
    assert pick_group_size(100) is None
    assert pick_group_size(64 * 3, 32) == 32


def config(**sizes: int) -> LlamaConfig:
    given = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return LlamaConfig(**(given | sizes))


@pytest.mark.parametrize(
    ("sizes", "ranks", "left"),
    [
        ({}, 1, set()),
        ({"intermediate_size": 272}, 1, {DOWN}),  # 272 = 8 * 34, no multiple of 32
        ({"intermediate_size": 250}, 1, {DOWN, *GATE_UP}),  # nor do 250 outputs pack
        ({"hidden_size": 144, "head_dim": 32}, 1, {*QKV, *GATE_UP}),
        ({"intermediate_size": 288}, 2, {DOWN}),  # 144 channels a rank
    ],
)
def test_linears_that_no_group_divides_stay_at_16_bits(
    sizes: dict[str, int], ranks: int, left: set[str]
) -> None:
    grids = GridSettings(tensor_parallel=ranks).grids(config(**sizes))
    assert set(LINEARS) - {name.split(".", 3)[3] for name in grids} == left


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(CompressError, match="no linear can be quantized.*at 16 bits"):
        GridSettings().grids(config(hidden_size=100, intermediate_size=250, head_dim=10))


def test_int4_is_rounded_as_before() -> None:
    """Plans and checkpoints of earlier versions stay as they are. Integers: exact everywhere."""
    codes = (torch.arange(64 * 256, dtype=torch.int64) * 2654435761 % 100_003 - 50_000).view(
        64, 256
    )
    weight = (codes.double() / 4096).float().view(64, 256)
    shrink = (torch.arange(64 * 8).view(64, 8) % 22 + 79) / 100
    found = []
    for grid in (Grid(64), Grid(32, symmetric=True)):
        narrow = shrink if grid.group_size == 32 else shrink[:, :4]
        for part in (quantize(weight, grid), quantize(weight, grid, shrink=narrow)):
            found += [tensor_digest(tensor) for tensor in (part.q, part.scale, part.zero)]
    assert digest(*found) == "057755e41620c6dc9b892d6cb2b181a6202e2fa9ad53ca52c44c128a25a6e6a0"


def test_stored_bits() -> None:
    assert Grid(128).stored_bits(4096) == 4 + 20 / 128
    assert Grid(64, symmetric=True, bits=3).stored_bits(4096) == 3.25
    assert Grid(PER_CHANNEL, symmetric=True, bits=8).stored_bits(4096) == 8 + 16 / 4096
