# SPDX-License-Identifier: Apache-2.0
"""vLLM's front end gives an engine up only where we think so, and the way out is a real command."""

import inspect
import shlex
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
from vllm import envs
from vllm.config import ParallelConfig
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.utils import CoreEngineActorManager, wait_for_engine_startup

from compress_common.errors import CompressError
from quant_methods.plan_request import PlanRequest
from vllm_plugin.commands.quantize import quantize
from vllm_plugin.quantization import start_limit

VARIABLE = "VLLM_ENGINE_READY_TIMEOUT_S"
REQUEST = PlanRequest(
    settings={"bits": 3, "symmetric": True, "rounding": "gptq", "tensor_parallel": 2},
    calibration={"source": "some text.txt", "samples": 8, "length": 64},
)


def config(servers: int) -> Any:
    parallel = ParallelConfig(_api_process_count=servers)
    return SimpleNamespace(
        parallel_config=parallel, model_config=SimpleNamespace(model="meta-llama/Llama-3.1-8B")
    )


def test_only_front_ends_beside_the_engine_give_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_limit.start_limit(config(1), REQUEST) is None
    limit = start_limit.start_limit(config(4), REQUEST)
    assert limit is not None
    # What has passed since this process began is taken off; that can be more than all.
    assert limit.seconds < start_limit._SHARE * envs.VLLM_ENGINE_READY_TIMEOUT_S
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setenv(VARIABLE, "9")
    limit = start_limit.start_limit(config(1), REQUEST)
    assert limit is not None
    with pytest.raises(CompressError) as raised:
        limit.check(100)
    for word in (VARIABLE, "now 9 s", "--api-server-count 1", "serve Llama-3.1-8B-quantized"):
        assert word in str(raised.value)


def test_vllm_waits_for_its_own_engines_without_a_limit() -> None:
    """With one API server the limit begins when the engines are ready, also under Ray."""
    assert VARIABLE not in inspect.getsource(wait_for_engine_startup)
    assert "ray.get(refs)" in inspect.getsource(CoreEngineActorManager.__init__)
    client = inspect.getsource(MPClient.__init__)
    assert client.index("with launch_core_engines(") < client.index(VARIABLE)
    assert client.index("if client_addresses:") < client.index(VARIABLE)


def test_the_command_asks_for_the_same_plan() -> None:
    words = shlex.split(start_limit.quantize_command("org/model", REQUEST, "model-quantized"))
    app = typer.Typer()
    app.command()(quantize)
    command = typer.main.get_command(app)
    assert words[:2] == ["vllm-compress", "quantize"]
    with click.Context(command) as context:
        command.parse_args(context, words[2:])
    given = context.params
    assert given["settings"] == ["bits=3", "symmetric=true", "rounding=gptq"]
    assert (given["samples"], given["length"], given["tensor_parallel_size"]) == (8, 64, 2)
    assert (given["calibration"], given["method"]) == ("some text.txt", "smoothquant_plus")


def test_the_command_names_the_seed_of_sampled_text() -> None:
    request = PlanRequest(calibration={"samples": 8, "length": 64, "seed": 5})
    command = start_limit.quantize_command("org/model", request, "out")
    assert command.endswith("--samples 8 --length 64 --seed 5")
