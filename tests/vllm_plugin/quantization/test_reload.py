# SPDX-License-Identifier: Apache-2.0
"""Engines that quantized at load reload the same weights, or say why not and go on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.reload_engine import reload

QUICK = {"calibration": {"samples": 2, "length": 16}, "alpha": 0.5, "group_size": 32}


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def test_a_calibrated_engine_reloads_only_its_own_weights(model: Path, tmp_path: Path) -> None:
    steps = ["sleep", "wake", "disk", "tensors", "path", "disk", "edit", "disk"]
    got = reload(model, "smoothquant_plus", steps, QUICK, tmp_path / "cache")
    refused = got["errors"]
    assert refused[:3] == [None, None, None]
    assert "cannot take 16-bit tensors" in refused[3]
    others = "other weights than this engine was quantized from"
    assert others in refused[4]
    assert refused[5:7] == [None, None]  # the path of the refused weights is forgotten
    assert others in refused[7]
    assert all(tokens == got["tokens"][0] for tokens in got["tokens"])


def test_rounding_to_nearest_takes_new_weights(model: Path, tmp_path: Path) -> None:
    """``edit`` negates a tensor, so two edits give the first weights again."""
    steps = ["edit", "disk", "edit", "disk"]
    got = reload(model, "rtn", steps, {"group_size": 32}, tmp_path / "cache")
    assert got["errors"] == [None] * 4
    before, edited, reloaded, _, again = got["tokens"]
    assert before == edited == again != reloaded
