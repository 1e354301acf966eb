# SPDX-License-Identifier: Apache-2.0
"""What the metrics build on in vLLM 0.32: an upgrade that changes it fails here."""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorStats,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import kv_transfer_utils
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

import vllm_plugin
from tests.support.llada import random_llada
from tests.support.logs import logged
from vllm_plugin.metrics import connector, cpu_cores
from vllm_plugin.metrics.catalogue import METRICS
from vllm_plugin.metrics.connector import StatsConnector
from vllm_plugin.metrics.prometheus import CompressMetrics, publish
from vllm_plugin.self_check import table
from vllm_plugin.settings import Settings, parse_settings


def configure(model: Path, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    return EngineArgs(
        model=str(model), enforce_eager=True, max_model_len=256, **engine
    ).create_engine_config()


def test_connector_implements_all_that_vllm_asks_for() -> None:
    assert not inspect.isabstract(StatsConnector)
    # vLLM's attention asks this before it waits for and saves each layer. Nothing else asks.
    assert "not connector.has_connector_metadata()" in inspect.getsource(kv_transfer_utils)
    assert StatsConnector.has_connector_metadata(None) is False  # type: ignore[arg-type]
    assert {"to_dict", "aggregate", "reduce", "is_empty", "reset"} <= set(dir(KVConnectorStats))
    assert "connector.bind_kv_cache_manager" in inspect.getsource(Scheduler.__init__)
    assert RayPrometheusStatLogger._kv_connector_cls is not None


@pytest.mark.parametrize(
    "engine",
    [
        {"additional_config": {"compress": {"kv": {"policy": "key_diff", "keep": 0.5}}}},
        {"quantization": "smoothquant_plus"},
    ],
)
def test_config_selects_the_connector(demo_model: Path, engine: dict[str, Any]) -> None:
    config = configure(demo_model, **engine)
    chosen = config.kv_transfer_config
    assert KVConnectorFactory.get_connector_class(chosen) is StatsConnector
    assert KVConnectorFactory.supports_hma_config(chosen)
    assert not chosen.is_kv_consumer  # freed blocks would be held back


@pytest.mark.parametrize(
    "section, rows",
    [
        (
            {},
            {
                "denoising": "fixed_period, period 4",
                "commits": "what is at least 0.9 probable",
                "predicts": "the leftmost 16 masks",
                "KV bytes a token": "2,048",
            },
        ),
        (
            {"policy": "elastic", "track": 2, "tokens_per_step": 3, "block_length": 8},
            {
                "denoising": "elastic, gamma 0.9, track 2, similarity row",
                "commits": "the likeliest 3 of a step",
                "predicts": "one block of 8 after the other",
                "KV bytes a token": "2,048",
                "layer inputs": "1,024 bytes a token more, on each rank",
            },
        ),
    ],
)
def test_a_diffusion_model_is_reported_and_described(
    tmp_path: Path, section: dict[str, Any], rows: dict[str, str]
) -> None:
    random_llada(tmp_path, layers=2)
    chosen = {"compress": {"diffusion": section}} if section else {}
    config = configure(
        tmp_path, skip_tokenizer_init=True, dtype="float32", additional_config=chosen
    )
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is StatsConnector
    found = dict(table(config, parse_settings(config.additional_config)))
    assert found.pop("weights").startswith("not compressed")
    assert found == rows


def test_metrics_can_be_switched_off(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then vLLM has no connector, for which each rank would answer in each step."""
    section = {"kv": {"policy": "key_diff", "keep": 0.5}, "metrics": False}
    with logged(caplog, "vllm_plugin.self_check"):
        config = configure(demo_model, additional_config={"compress": section})
    assert config.kv_transfer_config is None
    assert "key_diff" in caplog.text.partition("What is compressed")[2]


@pytest.mark.parametrize(
    "engine",
    [
        {"additional_config": {"compress": {"kv": {"policy": "key_diff", "keep": 0.5}}}},
        {"quantization": "smoothquant_plus"},
    ],
)
def test_as_many_cores_compute_as_in_a_stock_engine(
    demo_model: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves one more idle for a connector."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.delenv(cpu_cores.NAME, raising=False)

    def reserved(**engine: Any) -> int:
        return OMPProcessManager(configure(demo_model, **engine)).reserve_cpu_num

    stock = reserved()
    assert reserved(**engine) == stock
    own = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert reserved(kv_transfer_config=own) == stock + 1  # of a later engine: as ever
    monkeypatch.setenv(cpu_cores.NAME, "3")
    assert reserved(**engine) == 3  # a user's stays
    configure(demo_model)
    assert os.environ[cpu_cores.NAME] == "3"


def test_nothing_is_reported_where_nothing_is_compressed(demo_model: Path) -> None:
    assert configure(demo_model).kv_transfer_config is None


def test_beside_a_users_own_connector_the_weights_are_reported_and_described(
    demo_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with logged(caplog, "vllm_plugin.self_check"):
        config = configure(demo_model, quantization="smoothquant_plus", kv_transfer_config=own)
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"
    assert "smoothquant_plus" in caplog.text.partition("What is compressed")[2]
    labels = {"model_name": str(demo_model), "engine": "0"}
    size = {
        state: REGISTRY.get_sample_value("vllm_compress_weight_bytes", labels | {"state": state})
        for state in ("original", "compressed")
    }
    assert 0.4 < size["compressed"] / size["original"] < 0.5
    (info,) = [f for f in REGISTRY.collect() if f.name == "vllm_compress_info"]
    assert [sample.labels["method"] for sample in info.samples] == ["smoothquant_plus"]


def test_figures_that_fail_beside_a_users_own_connector_end_no_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(config: VllmConfig) -> None:
        raise OSError("the prometheus directory is full")

    monkeypatch.setattr(connector, "publish", fail)
    own = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    config = VllmConfig(kv_transfer_config=own)
    with logged(caplog, "vllm_plugin.metrics.connector"):
        connector.report(config, Settings())
    assert config.kv_transfer_config is own
    (warning,) = [each for each in caplog.records if "missing from /metrics" in each.message]
    assert "OSError: the prometheus directory is full" in warning.message


def test_each_managed_engine_has_series_of_its_own(demo_model: Path) -> None:
    config = configure(demo_model, quantization="smoothquant_plus")
    config.parallel_config.data_parallel_size = 3
    config.parallel_config.data_parallel_index = 0
    publish(config)
    (info,) = [f for f in REGISTRY.collect() if f.name == "vllm_compress_info"]
    assert [sample.labels["engine"] for sample in info.samples] == ["0", "1", "2"]


def test_a_multi_connector_with_ours_is_left_to_itself(
    demo_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM builds our families then, once the engine is up."""
    module = "vllm_plugin.metrics.connector"
    children = [
        {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        {
            "kv_connector": "StatsConnector",
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
        },
    ]
    own = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": children},
    )
    with logged(caplog, "vllm_plugin.self_check"):
        config = configure(demo_model, quantization="smoothquant_plus", kv_transfer_config=own)
    assert config.kv_transfer_config.kv_connector == "MultiConnector"
    assert "What is compressed" not in caplog.text


def test_a_second_engine_in_a_process_replaces_the_series_of_the_first(demo_model: Path) -> None:
    config = configure(demo_model, quantization="smoothquant_plus")
    types = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    for engines in ({0: ["m", "0"]}, {0: ["m", "0"], 1: ["m", "1"]}):
        CompressMetrics(config, types, ["model_name", "engine"], engines)
        for metric in METRICS:
            labels = {"model_name": "m", "engine": str(len(engines) - 1)}
            families = [f for f in REGISTRY.collect() if f.name == metric.full_name]
            assert len(families) == 1
            found = [s.labels for s in families[0].samples]
            assert any(labels.items() <= each.items() for each in found)
