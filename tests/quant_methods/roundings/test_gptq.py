# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from quant_methods.calibration.text import CalibrationSettings
from quant_methods.checkpoint import Checkpoint
from quant_methods.grid import Grid, quantize
from quant_methods.planning import PlanRequest, obtain_plan
from quant_methods.roundings.gptq import gptq_quantize


def correlated(seed: int, k: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [32, k] and inputs [512, k] whose channels hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k // 4, k, generator=generator)
    x = torch.randn(512, k // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(512, k, generator=generator)
    return torch.randn(32, k, generator=generator), x


@given(st.integers(0, 10_000), st.booleans())
@settings(deadline=None, max_examples=20)
def test_output_error_is_below_round_to_nearest(seed: int, symmetric: bool) -> None:
    weight, x = correlated(seed)
    grid = Grid(32, symmetric)
    compensated = gptq_quantize(weight, grid, x.t() @ x / len(x))
    nearest = quantize(weight, grid)
    assert compensated.q.max() <= 15
    errors = [(x @ (q.dequantize() - weight).t()).square().sum() for q in (compensated, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_independent_inputs_round_to_nearest() -> None:
    weight, _ = correlated(0)
    assert torch.equal(
        gptq_quantize(weight, Grid(64), torch.eye(128)).q, quantize(weight, Grid(64)).q
    )


def test_dead_inputs_and_rank_deficient_hessians() -> None:
    weight, x = correlated(1)
    x[:, 7] = 0
    x = x[:40]  # fewer tokens than channels
    rounded = gptq_quantize(weight, Grid(32), x.t() @ x / len(x))
    assert torch.isfinite(rounded.dequantize()).all()


def test_non_finite_hessian_is_refused() -> None:
    weight, _ = correlated(1)
    with pytest.raises(CompressError, match="degenerate"):
        gptq_quantize(weight, Grid(32), torch.full((128, 128), torch.nan))


def test_plan_with_codes_survives_its_cache(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    checkpoint = Checkpoint(tiny_model("qwen2"))
    request = PlanRequest(
        settings={"alpha": 0.5, "rounding": "gptq", "folds": "all", "group_size": 32},
        calibration=CalibrationSettings(samples=4, length=64),
    )
    plan, cached = obtain_plan(checkpoint, request)
    again, cached_again = obtain_plan(checkpoint, request)
    assert (cached, cached_again) == (False, True)
    assert plan.codes.keys() == plan.grids.keys() == again.codes.keys()
    for name, weight in plan.codes.items():
        assert torch.equal(again.codes[name].dequantize(), weight.dequantize())
        assert (
            again.quantized(name, torch.empty(weight.q.shape), torch.bfloat16).grid.group_size == 32
        )
