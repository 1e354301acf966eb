# SPDX-License-Identifier: Apache-2.0
"""A calibration that cannot end in time is refused, and no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from quant_methods import planning
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.time_limit import TimeLimit, least_operations, operations_per_second

LIMIT = TimeLimit(100, "do something else")
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


class Clock:
    """Seconds that pass with each item of work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, told: Progress, step: str, items: int, seconds: float, begin: int = 1) -> None:
        for done in range(begin, items + begin):
            told(step, done, items)
            self.seconds += seconds


def test_too_slow_is_refused_after_a_few_items() -> None:
    clock = Clock()
    told = LIMIT.judged(silent, clock)
    with pytest.raises(CompressError, match=r"at least 124 s .* has 100 s .*; do something else$"):
        clock.work(told, "gptq", 32, 4)
    assert clock.seconds == 8  # two blocks


@pytest.mark.parametrize("begin", [0, 1])
def test_in_time_is_never_refused(begin: int) -> None:
    clock, seen = Clock(), []
    told = LIMIT.judged(lambda *step: seen.append(step), clock)
    clock.work(told, "sample text, token", 30, 0.5, begin)
    clock.work(told, "gptq", 32, 1, begin)
    clock.work(told, "gptq", 32, 1, begin)  # once more: its time is not that of the first
    assert len(seen) == 94


def test_a_slow_first_item_says_nothing_of_the_rest() -> None:
    """A device that has to start, for one."""
    clock = Clock()
    told = LIMIT.judged(silent, clock)
    told("sample text, token", 0, 128)
    clock.seconds += 10
    clock.work(told, "sample text, token", 128, 0.05)


def test_steps_that_are_told_once_count_too() -> None:
    """The alphas of a search have a name each."""
    clock = Clock()
    told = LIMIT.judged(silent, clock)
    with pytest.raises(CompressError, match="at least 140 s"):
        for done in range(7):
            told(f"alpha {done / 10:.2f} ({done})", done, 7)
            clock.seconds += 20
    assert clock.seconds == 40


def test_what_cannot_end_is_refused_before_the_work() -> None:
    LIMIT.check(100)
    with pytest.raises(CompressError, match="at least 28 minutes"):
        LIMIT.check(1700)
    with pytest.raises(CompressError, match="has 0 s until"):
        TimeLimit(-5, "do something else").check(1)


def test_operations_of_an_8b_model() -> None:
    """2 x 7e9 a token and pass, and for GPTQ K^2 (2 tokens + N + K) a unit."""
    given: dict[str, Any] = {"sampled": False, "gram": False}
    once = least_operations(LLAMA_8B, 1024, **given)
    assert once == pytest.approx(2 * 6.98e9 * 1024, rel=0.01)
    assert least_operations(LLAMA_8B, 1024, **given | {"sampled": True}) == 2 * once
    gptq = least_operations(LLAMA_8B, 1024, **given | {"gram": True}) - 2 * once
    assert 100e12 < gptq < 200e12


def test_the_speed_of_this_processor_is_plausible() -> None:
    assert 1e8 < operations_per_second(torch.device("cpu"), torch.float32) < 1e14


def test_a_plan_without_time_is_refused_before_the_model_is_loaded(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that needs no calibration, or is there already, is not."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    request = PlanRequest(calibration={"samples": 2, "length": 16})
    checkpoint, late = Checkpoint(tiny_model("llama")), TimeLimit(0, "do something else")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "load_model", lambda *args: pytest.fail("loaded"))
        with pytest.raises(CompressError, match=r"do something else$"):
            obtain_plan(checkpoint, request, limit=late)
        obtain_plan(checkpoint, PlanRequest(method="rtn"), limit=late)
    obtain_plan(checkpoint, request)
    obtain_plan(checkpoint, request, limit=late)
