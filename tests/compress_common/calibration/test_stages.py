# SPDX-License-Identifier: Apache-2.0
"""An interrupted calibration goes on where it stopped, and ends with the same plan."""

import os
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path

import pytest
import torch

from compress_common.calibration import texts
from compress_common.calibration.stages import Stages
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.store import Store, digest
from quant_methods import planning
from quant_methods.formats.plan import Plan
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.transforms.smoothed_decoder import SmoothedDecoder
from tests.support.interrupting import in_parts, random_numbers, stages_of

REQUEST = PlanRequest(
    settings={"group_size": 32, "folds": "all", "rounding": "gptq"},
    calibration={"samples": 4, "length": 32},
)


def same(first: Plan, second: Plan) -> bool:
    """Bit for bit."""
    return (
        first.report == second.report
        and first.sources == second.sources
        and all(torch.equal(first.vectors[k], v) for k, v in second.vectors.items())
        and all(torch.equal(first.shrinks[k], v) for k, v in second.shrinks.items())
        and all(torch.equal(first.codes[k].words, v.words) for k, v in second.codes.items())
        and all(torch.equal(first.codes[k].scale, v.scale) for k, v in second.codes.items())
    )


def test_the_plan_equals_that_of_a_whole_run(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every block and every alpha."""
    checkpoint, random, sampled = Checkpoint(tiny_model("qwen2")), random_numbers(), []
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "whole"))
    with stages_of() as names:
        whole, _ = obtain_plan(checkpoint, REQUEST)
    assert {"statistics", "alpha 0.40", "gptq 0", "gptq 1"} <= set(names)

    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "parts"))
    original = texts.sampled_tokens
    monkeypatch.setattr(texts, "sampled_tokens", lambda *args: sampled.append(1) or original(*args))
    (resumed, stored), parts = in_parts(lambda: obtain_plan(checkpoint, REQUEST), names, random)
    assert not stored and same(whole, resumed)
    assert parts == [[name] for name in names]  # nothing is computed twice
    assert len(sampled) == 1
    left = list((tmp_path / "parts" / "calibration-stage").iterdir())
    assert not left  # a finished plan needs none of them


def test_stages_stay_until_the_plan_is_stored(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    checkpoint, stages = Checkpoint(tiny_model("qwen2")), tmp_path / "calibration-stage"

    def full(*args: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CompressError, match="No space left"):
        patch.setattr(planning, "save_plan", full)
        obtain_plan(checkpoint, REQUEST)
    assert any(path.is_dir() for path in stages.iterdir())
    monkeypatch.setattr(SmoothedDecoder, "_observe", lambda *args: pytest.fail("observed again"))
    obtain_plan(checkpoint, REQUEST)
    assert not list(stages.iterdir())


def test_stages_of_other_work_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    assert Stages(digest("one")).number("loss", lambda: 0.1) == 0.1
    assert Stages(digest("one")).number("loss", lambda: 0.2) == 0.1
    assert Stages(digest("two")).number("loss", lambda: 0.2) == 0.2
    assert Stages().number("loss", lambda: 0.3) == 0.3


def test_a_finished_calibration_leaves_none_of_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those within a stage that an earlier run finished, nor those before a full disk."""
    store, folder = Store(tmp_path), tmp_path / "calibration-stage"

    def outer(stages: Stages) -> float:
        return stages.number("outer", lambda: stages.number("inner", lambda: 0.1))

    def left() -> int:
        return sum(path.is_dir() for path in folder.iterdir())

    def full_disk(*args: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    outer(Stages(digest("one"), store))
    Stages(digest("two"), store).number("outer", lambda: 0.2)
    again = Stages(digest("one"), store)
    assert outer(again) == 0.1 and left() == 3
    again.clear()
    assert left() == 1

    full = Stages(digest("two"), store)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "make", full_disk)
        assert full.number("later", lambda: 0.3) == 0.3
    assert full.number("last", lambda: 0.4) == 0.4 and not full.has("last")
    full.clear()
    assert not left()


def test_a_stage_is_read_again_from_its_file(tmp_path: Path) -> None:
    stages = Stages(digest("one"), Store(tmp_path))
    first = stages.tensors("part", lambda: {"x": torch.arange(8)})
    again = stages.reread("part", first)
    assert torch.equal(again["x"], first["x"]) and again["x"].data_ptr() != first["x"].data_ptr()
    assert stages.reread("lost", first) is first
    assert Stages().reread("part", first) is first


def test_a_stage_that_cannot_be_looked_at_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    stages = Stages(digest("one"))
    stages.number("loss", lambda: 0.1)
    assert stages.has("loss") and not stages.has("other")

    def denied(path: Path, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied)
        found = stages.has("loss")
    assert not found
