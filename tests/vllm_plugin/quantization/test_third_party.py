# SPDX-License-Identifier: Apache-2.0
"""A method of another package, found by its entry point: served at load and from its checkpoint."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.child import SINGLE_PROCESS, in_child
from tests.support.generate import _generate

SOURCE = """
from quant_methods.methods.rtn import RoundToNearest

class Theirs(RoundToNearest):
    name, revision = "theirs", 1
"""
ENTRY = "[vllm_compress.quant_methods]\ntheirs = their_method:Theirs\n"
SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 32}  # its checkpoint needs the plugin
ENGINE = {
    "max_model_len": 128,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.2,
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Their package, as pip installs it."""
    site = tmp_path / "site"
    info = site / "their_method-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_method.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    return site


def _with_theirs(site: str, model: str, out: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """In a child: quantize the model unless it is done, and generate."""
    sys.path.insert(0, site)
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.plan_request import PlanRequest

    if not Path(out).exists():
        quantize_checkpoint(Path(model), Path(out), PlanRequest(method="theirs", settings=SETTINGS))
    given = {"model": model, "prompts": ["The capital of France is"], "max_tokens": 8}
    return _generate(given | {"engine_args": ENGINE | arguments})


def test_it_is_served_at_load_and_from_its_checkpoint(
    tiny_model: Callable[..., Path], installed: Path, tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    env = os.environ | SINGLE_PROCESS
    env |= {"COMPRESS_INT4_ROWS": "16", "VLLM_COMPRESS_CACHE": str(tmp_path / "cache")}
    section = {"compress": {"weights": SETTINGS}}
    at_load = {"quantization": "theirs", "additional_config": section}

    def answer(served: Path, arguments: dict[str, Any]) -> dict[str, Any]:
        given = str(installed), str(served), str(out), arguments
        return in_child(_with_theirs, *given, env=env, timeout=600)

    raw, written = answer(model, at_load), answer(out, {})
    assert raw["quantization"] == written["quantization"] == "theirs"
    assert raw["tokens"] == written["tokens"]
    assert '"quant_method": "vllm_compress_plugin"' in (out / "config.json").read_text()
