# SPDX-License-Identifier: Apache-2.0
"""The front end's side: metric families, set at the start and with each report."""

from importlib.metadata import version
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from vllm_plugin.kv_cache import requests
from vllm_plugin.metrics.catalogue import BY_NAME, METRICS, Metric
from vllm_plugin.metrics.facts import Facts, facts_of
from vllm_plugin.metrics.lasting_gauge import LastingGauge


class CompressMetrics(KVConnectorPromMetrics):
    """The families of the catalogue, for every engine, with values before the first request.

    vLLM hands over the metric types, so Ray's replace Prometheus's under Ray.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        if self._gauge_cls is Gauge:
            _unregister()
        facts = facts_of(vllm_config)
        self._policy = facts.info["policy"]
        self._series: dict[tuple[int, str, str], Any] = {}
        for metric in METRICS:
            self._create(metric, facts)
        for engine in per_engine_labelvalues:
            self._series[engine, "info", ""].set(1)
            for name, value in facts.gauges.items():
                self._series[(engine, *name)].set(value)
        first = next(iter(per_engine_labelvalues))
        # No engine sees a refused request. They are counted for the first engine.
        requests.on_refusal = lambda reason: self._series[first, "refused_requests", reason].inc()

    def _create(self, metric: Metric, facts: Facts) -> None:
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "gauge": (self._gauge_cls, {"multiprocess_mode": "mostrecent"}),
            "counter": (self._counter_cls, {}),
            "histogram": (self._histogram_cls, {"buckets": list(metric.buckets)}),
        }
        kind, options = kinds[metric.kind]
        family = kind(
            name=metric.full_name,
            documentation=metric.meaning,
            labelnames=[*self._labelnames, *metric.labels],
            **options,
        )
        for engine, values in self.per_engine_labelvalues.items():
            if metric.name == "info":
                info = {"version": version("vllm-compress-plugin")} | facts.info
                choices = {"": tuple(info[label] for label in metric.labels)}
            elif metric.labels:
                choices = {label: (label,) for label in metric.values or (self._policy,)}
            else:
                choices = {"": ()}
            for label, own in choices.items():
                series = family.labels(*values, *own)
                if metric.kind == "gauge" and self._gauge_cls is not Gauge:
                    series = LastingGauge(series)
                self._series[engine, metric.name, label] = series

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report.

        Args:
            transfer_stats_data: The ``data`` of ``CompressStats``.
            engine_idx: Index of the engine that reports.
        """
        for name, labels in transfer_stats_data["counters"].items():
            for label, amount in labels.items():
                label = self._policy if BY_NAME[name].labels == ("policy",) else label
                self._series[engine_idx, name, label].inc(amount)
        for name, value in transfer_stats_data["gauges"].items():
            self._series[engine_idx, name, ""].set(value)
        for seconds in transfer_stats_data["seconds"]:
            self._series[engine_idx, "kv_compaction_seconds", ""].observe(seconds)


def publish(config: VllmConfig) -> None:
    """Publish the facts of an engine that has no connector of ours, from this process.

    The process that makes the config serves ``/metrics`` as well. Under Ray it does not, and
    nothing is published. Counters stay at 0, except refusals.

    Args:
        config: Of an engine that compresses weights alone.
    """
    parallel = config.parallel_config
    first = parallel.data_parallel_index
    local = parallel.data_parallel_size_local
    count = local if parallel.local_engines_only else parallel.data_parallel_size
    name = config.model_config.served_model_name
    types = {kind: kind for kind in (Gauge, Counter, Histogram)}
    engines: dict[int, list[object]] = {n: [name, str(n)] for n in range(first, first + count)}
    CompressMetrics(config, types, ["model_name", "engine"], engines)


def _unregister() -> None:
    """Remove the families of an earlier engine in this process, as vLLM does with its own."""
    for metric in METRICS:
        collector = REGISTRY._names_to_collectors.get(metric.full_name)
        if collector is not None:
            REGISTRY.unregister(collector)
