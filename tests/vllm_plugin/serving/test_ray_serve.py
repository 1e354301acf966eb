# SPDX-License-Identifier: Apache-2.0
"""A compressed model through Ray Serve: answers, metrics, and the death of its engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.child import ROOT
from tests.vllm_plugin.serving import loopback
from tests.vllm_plugin.serving.ray_driver import METRICS
from vllm_plugin.metrics.catalogue import METRICS as CATALOGUE

OPTIONS = ["--quantization", "smoothquant_plus", "--policy", "snap_kv", "--keep", "0.25"]
ENGINE = {"max_model_len": 1024, "enforce_eager": True, "dtype": "bfloat16"}
NOTICED = 1.0  # seconds within which a dead engine is out of the way


@pytest.fixture(scope="module")
def seen(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    if reason := loopback.refusal():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("ray") / "seen.json"
    driver = [sys.executable, "-m", "tests.vllm_plugin.serving.ray_driver", str(out)]
    command = [*loopback.PREFIX, *driver, str(demo_model), *OPTIONS]
    command += ["--engine-kwargs", json.dumps(ENGINE)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=900)
    return json.loads(out.read_text())


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def test_chat_completions(seen: dict[str, Any]) -> None:
    for answer in ("answer", "streamed", "long"):
        assert "Tokyo" in seen[answer]
    assert seen["streamed"] == seen["answer"]
    assert seen["exit_code"] == 0  # after Ctrl-C


def test_metrics_of_the_plugin_reach_rays_agent(seen: dict[str, Any]) -> None:
    values = seen["metrics"]
    assert all(values.get(name, 0) > 0 for name in METRICS), values
    # Ray exports a counter from its first increment on, but gauges are there from the start.
    gauges = {f"ray_{metric.exported}" for metric in CATALOGUE if metric.kind == "gauge"}
    assert gauges <= values.keys()
    assert gauges <= seen["metrics_when_idle"].keys()


def test_a_dead_engine_costs_what_is_in_flight(seen: dict[str, Any]) -> None:
    kill = seen["kill"]
    assert len(kill["in_flight_errors"]) == kill["in_flight"] == 2  # told, not left hanging
    assert kill["in_flight_told_after_seconds"] < 10
    assert all(request["begin"] < NOTICED for request in kill["lost"]), kill["lost"]
    assert kill["followed"] - kill["followed_lost"] >= 5
    assert "Tokyo" in seen["answer_after"]
