# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.grid import PER_CHANNEL, Grid, quantize, searched_shrink
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.roundings import gptq
from quant_methods.roundings.base import output_error
from quant_methods.roundings.gptq import GPTQ, damping, inverse_factor


def correlated(seed: int, k: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [32, k] and inputs [512, k] whose channels hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k // 4, k, generator=generator)
    x = torch.randn(512, k // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(512, k, generator=generator)
    return torch.randn(32, k, generator=generator), x


@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.integers(2, 8),
    st.sampled_from([32, PER_CHANNEL]),
    st.builds(GPTQ, st.sampled_from(["energy", "stored"]), st.sampled_from(["search", "minmax"])),
)
@settings(deadline=None, max_examples=40)
def test_output_error_is_below_round_to_nearest(
    seed: int, symmetric: bool, bits: int, group: int, rounding: GPTQ
) -> None:
    weight, x = correlated(seed)
    grid, gram = Grid(group, symmetric, bits), x.t() @ x / len(x)
    compensated, nearest = rounding.round(weight, grid, gram), quantize(weight, grid)
    assert int(compensated.q.max()) < grid.levels
    errors = [output_error(weight, q.dequantize(), gram) for q in (compensated, nearest)]
    assert errors[0] < 0.7 * errors[1]
    inputs = ((compensated.dequantize() - weight) @ x.t()).square().sum() / len(x)
    assert inputs.item() == pytest.approx(errors[0], rel=0.02)


def test_independent_inputs_round_to_nearest() -> None:
    weight, _ = correlated(0)
    rounded = GPTQ(ranges="minmax").round(weight, Grid(64), torch.eye(128))
    assert torch.equal(rounded.q, quantize(weight, Grid(64)).q)


def test_stacked_linears_are_rounded_as_each_alone() -> None:
    weight, x = correlated(3)
    gram = x.t() @ x / len(x)
    both = GPTQ().round(torch.cat([weight, 3 * weight]), Grid(32), gram).split([32, 32])
    for part, alone in zip(both, (weight, 3 * weight), strict=True):
        assert torch.equal(part.q, GPTQ().round(alone, Grid(32), gram).q)


@pytest.mark.parametrize("size", [128, 256, 600])  # below, at and above a block
def test_the_factor_is_that_of_the_inverse(size: int) -> None:
    _, x = correlated(4, size)
    gram = x.t() @ x / len(x)
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(inverse_factor(gram).double(), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_memory_saved_changes_no_code(seed: int) -> None:
    """Rows rounded in several parts, and the Gram matrix overwritten."""
    weight, x = correlated(seed)
    gram, grid = x.t() @ x / len(x), Grid(32)
    whole = GPTQ().round(weight, grid, gram)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_ELEMENTS", 10 * 128)
        parts = GPTQ().round(weight, grid, gram.clone(), reuse_gram=True)
    assert parts.q.shape == whole.q.shape and torch.equal(parts.scale, whole.scale)
    assert (parts.q != whole.q).float().mean() < 0.01  # sums in another order can break ties


def test_a_gram_matrix_that_needs_fp64_is_restored_first() -> None:
    """fp32 fails on it, after it has overwritten a triangle."""
    base = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    gram = base.t() @ base
    gram = torch.maximum(gram, gram.t())
    damped = gram.double() + 1e-7 * gram.diagonal().mean() * torch.eye(600)
    factor = inverse_factor(gram.clone(), damp=1e-7).double()
    assert torch.isfinite(factor).all()
    product = factor.t() @ factor @ damped
    if torch.linalg.cholesky_ex(damped).info == 0:
        assert (product - torch.eye(600)).abs().max() < 0.5


def test_searched_ranges_never_raise_the_weighted_error() -> None:
    weight, x = correlated(5)
    weight[:, 5] *= 6
    energy, grid = x.square().mean(0), Grid(64, bits=3)
    energy[5] = 0.01  # the outlier hardly matters

    def error(shrink: torch.Tensor | None) -> torch.Tensor:
        change = quantize(weight, grid, shrink=shrink).dequantize() - weight
        return (change.square() * energy).view(32, 2, 64).sum(-1)

    assert (error(searched_shrink(weight, grid, energy)) <= error(None)).all()


def test_dead_inputs_and_rank_deficient_grams() -> None:
    weight, x = correlated(1)
    x[:, 7] = 0
    x = x[:40]  # fewer tokens than channels
    rounded = GPTQ().round(weight, Grid(32), x.t() @ x / len(x))
    assert torch.isfinite(rounded.dequantize()).all()


def test_non_finite_gram_is_refused() -> None:
    weight, _ = correlated(1)
    with pytest.raises(CompressError, match="degenerate"):
        GPTQ().round(weight, Grid(32), torch.full((128, 128), torch.nan))


def test_plan_with_codes_survives_its_cache(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    checkpoint = Checkpoint(tiny_model("qwen2"))
    request = PlanRequest(
        settings={"alpha": 0.5, "rounding": "gptq", "folds": "all", "group_size": 32, "bits": 3},
        calibration=CalibrationSettings(samples=4, length=64),
    )
    plan, cached = obtain_plan(checkpoint, request)
    again, cached_again = obtain_plan(checkpoint, request)
    assert (cached, cached_again) == (False, True)
    assert plan.codes.keys() == plan.grids.keys() == again.codes.keys()
    for name, packed in plan.codes.items():
        weight = packed.unpacked()
        assert torch.equal(again.codes[name].unpacked().dequantize(), weight.dequantize())
        assert again.quantized(name, torch.empty(weight.q.shape), torch.bfloat16).grid == Grid(
            32, bits=3
        )


def test_fewer_calibration_tokens_are_followed_less_closely() -> None:
    damp = [damping(tokens) for tokens in (512, 1024, 2048, 4096, 8192, 1 << 18)]
    assert damp == sorted(damp, reverse=True)
    assert damping(2048) == 0.15 and damping(8192) == damping(None) == 0.01
    weight, x = correlated(5)
    gram = x.t() @ x / len(x)
    few, many = (GPTQ().round(weight, Grid(32), gram, tokens=n).q for n in (2048, 8192))
    assert not torch.equal(few, many)
    assert torch.equal(few, GPTQ(damp=0.15).round(weight, Grid(32), gram).q)
