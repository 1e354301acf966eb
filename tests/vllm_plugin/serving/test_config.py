# SPDX-License-Identifier: Apache-2.0
"""What llm_config hands to Ray, what vLLM makes of it, and what it refuses; no cluster."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_common.errors import CompressError
from vllm_plugin.serving import llm_config

KV = {"policy": "snap_kv", "keep": 0.25}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of pydantic


@pytest.fixture
def ray() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")


def test_everything_ray_needs_of_vllm_exists(ray: None) -> None:
    # Not importorskip: a name that a new vLLM has lost is what this is for.
    importlib.import_module("ray.llm._internal.serve.engines.vllm.vllm_engine")
    importlib.import_module("ray.serve.llm")
    importlib.import_module("vllm_plugin.serving.server")


def test_vllm_gets_our_settings(ray: None, demo_model: Path) -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import _get_vllm_engine_config

    config = llm_config(
        demo_model,
        quantization="smoothquant_plus",
        compress={"kv": KV, "weights": {"group_size": 64}},
        device="cpu",
        engine_kwargs={"max_model_len": 512, "additional_config": {"other": 1}},
    )
    assert config.model_id == demo_model.name
    _, vllm = _get_vllm_engine_config(config)  # where a replica gets its own from
    assert vllm.model_config.quantization == "smoothquant_plus"
    assert vllm.model_config.max_model_len == 512
    assert vllm.additional_config["other"] == 1
    assert vllm.additional_config["compress"]["kv"] == KV
    assert vllm.parallel_config.worker_cls.endswith("CompressedWorker")
    assert vllm.load_config.load_format == "compress"


def test_placement_and_scaling(ray: None, demo_model: Path) -> None:
    on_cpu = llm_config(demo_model, device="cpu", tensor_parallel_size=2, cpus=4)
    assert on_cpu.accelerator_config.kind == "cpu"
    assert on_cpu.get_engine_config().placement_bundles == [{"CPU": 4}, {"CPU": 4}]
    assert on_cpu.runtime_env["env_vars"]["OMP_NUM_THREADS"] == "4"
    assert on_cpu.runtime_env["env_vars"]["VLLM_PLUGINS"] == "compress"
    assert "request_router_config" not in on_cpu.deployment_config

    on_gpu = llm_config("org/model", device="gpu", tensor_parallel_size=2, replicas=(1, 3))
    assert on_gpu.model_id == "org/model"
    assert on_gpu.get_engine_config().placement_bundles == [{"GPU": 1}, {"GPU": 1}]
    assert "OMP_NUM_THREADS" not in on_gpu.runtime_env["env_vars"]
    deployment = on_gpu.deployment_config
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == 32
    assert "PrefixCacheAffinityRouter" in str(deployment["request_router_config"])
    plain = llm_config("org/model", device="gpu", replicas=2, prefix_aware=False)
    assert "request_router_config" not in plain.deployment_config


def test_paths_are_absolute(ray: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_model.parent)
    section = {
        "kv": {"policy": "prefix_kv", "profile": "kv.json"},
        "weights": {"calibration": {"source": "text.txt"}},
    }
    config = llm_config(
        demo_model.name, quantization="smoothquant_plus", compress=section, device="cpu"
    )
    here = Path.cwd()
    assert config.model_loading_config.model_source == str(here / demo_model.name)
    made = config.engine_kwargs["additional_config"]["compress"]
    assert made["kv"]["profile"] == str(here / "kv.json")
    assert made["weights"]["calibration"]["source"] == str(here / "text.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compress": {"vk": {}}}, "unknown setting 'vk'; did you mean 'kv'"),
        ({"compress": {"kv": {"policy": "snap_kv"}}}, "needs `keep`"),
        ({"compress": {"kv": {"policy": "snapkv", "keep": 1}}}, "did you mean 'snap_kv'"),
        ({"compress": {"kv": KV | {"windows": 4}}}, "did you mean 'window'"),
        (
            {"quantization": "smoothquant_plus", "compress": {"weights": {"alpha": 7}}},
            "alpha",
        ),
        ({"quantization": "awq", "compress": {"weights": {}}}, "not 'awq'"),
        ({"engine_kwargs": {"quantization": "rtn"}}, "is an argument of llm_config"),
        ({"engine_kwargs": {"max_modl_len": 5}}, "'max_modl_len'; did you mean 'max_model_len'"),
        ({"quantization": "smothquant_plus"}, "did you mean 'smoothquant_plus'"),
        ({"compress": {"kv": {"policyy": "snap_kv", "keep": 1}}}, "did you mean 'policy'"),
        ({"compress": {"kv": {"policy": "snap_kv", "kep": 1}}}, "did you mean 'keep'"),
        (
            {"compress": {"kv": KV}, "engine_kwargs": {"additional_config": {"compress": {}}}},
            "give it as `compress`",
        ),
        (
            {"engine_kwargs": {"additional_config": {"comprss": {"kv": KV}}}},
            "'comprss'; did you mean 'compress'",
        ),
        ({"replicas": (3, 2)}, "replicas 3 to 2"),
        ({"replicas": 0}, "replicas 0 to 0"),
        ({"device": "tpu"}, "none of auto, cpu, gpu"),
        ({"cpus": 0}, "1 or more"),
        ({"env": {"VLLM_PLUGINS": "other"}}, "leaves out this plugin"),
    ],
)
def test_refusals(ray: None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        llm_config("org/model", **{"device": "cpu"} | arguments)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.llm", None)
    with pytest.raises(CompressError, match=r"pip install 'vllm-compress-plugin\[ray\]'"):
        llm_config("org/model", device="cpu")
    with pytest.raises(CompressError, match="unknown setting"):  # told first
        llm_config("org/model", compress={"x": 1})


@pytest.fixture
def command() -> Callable[..., None]:
    from vllm_plugin.commands.ray_serve import ray_serve

    return ray_serve


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5}, "--keep needs --policy"),
        ({"policy": "snap_kv"}, "needs `keep`"),
        ({"additional_config": "{"}, "--additional-config is not JSON"),
        ({"additional_config": "[]"}, "must be a JSON object"),
        ({"additional_config": '{"compress": 1}'}, "must be an object, got 1"),
        (
            {"policy": "snap_kv", "additional_config": '{"compress": {"kv": {}}}'},
            "not both",
        ),
        ({"engine_kwargs": "5"}, "--engine-kwargs must be a JSON object"),
        ({"replicas": "two"}, "neither a number nor FEWEST:MOST"),
        ({"device": "tpu"}, "none of auto, cpu, gpu"),
    ],
)
def test_bad_options(command: Callable[..., None], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        command("org/model", **options)
