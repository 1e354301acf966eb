# SPDX-License-Identifier: Apache-2.0
"""What calibration computes in, and that the key of a plan says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress_common.calibration import precision
from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from quant_methods.formats.plan_file import plan_digest
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan

QUICK = PlanRequest(
    settings={"group_size": 32, "alpha": 0.5}, calibration=CalibrationSettings(samples=2, length=16)
)


def on(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def test_float32_only_where_it_is_faster_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "total_memory", lambda: 16 << 30)
    on(monkeypatch, "AVX512")
    assert precision.computed_in(1 << 30, "cpu") is None
    on(monkeypatch, "AVX2")
    assert precision.computed_in(4 << 30, "cpu") == torch.float32
    assert precision.computed_in((4 << 30) + 2, "cpu") is None
    assert precision.computed_in(1 << 30, "cuda") is None


def test_a_plan_computed_in_float32_is_another_plan(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint(tiny_model("qwen2"))
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "slow"))
    on(monkeypatch, "AVX2")
    in_float32, _ = obtain_plan(source, QUICK)
    assert in_float32.report["calibration"]["dtype"] == "float32"
    assert obtain_plan(source, QUICK)[1]
    norms = [v for name, v in in_float32.vectors.items() if name.endswith("norm.weight")]
    assert norms and all(torch.equal(v, v.bfloat16().float()) for v in norms)  # as it is served
    on(monkeypatch, "AVX512")
    fast, stored = obtain_plan(source, QUICK)
    assert not stored and fast.report["calibration"]["dtype"] == "bfloat16"
    on(monkeypatch, "AVX2")  # a plan of a faster machine serves as well, so that replicas agree
    shared, stored = obtain_plan(source, QUICK)
    assert stored and plan_digest(shared) == plan_digest(fast)
