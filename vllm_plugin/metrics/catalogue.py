# SPDX-License-Identifier: Apache-2.0
"""Every metric of the plugin: name, kind, meaning, labels.

Tests check dashboards and alerts against this list. The labels ``model_name`` and ``engine`` come
first in each metric, as in vLLM's own.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "vllm_compress_"


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes:
        name: Name without prefix. A counter is exported with ``_total`` behind it.
        kind: Type in Prometheus.
        meaning: Help text on ``/metrics``.
        labels: Labels beyond ``model_name`` and ``engine``.
        values: Values of the only label, if there are finitely many.
        buckets: Upper bounds of a histogram, in seconds.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The name with our prefix."""
        return PREFIX + self.name

    @property
    def exported(self) -> str:
        """The name in PromQL. A histogram's series add ``_bucket``, ``_sum`` and ``_count``."""
        return self.full_name + ("_total" if self.kind == "counter" else "")


# Reasons to refuse a request.
REFUSALS = ("compress_keep", "compress_budget", "unknown_key", "prefix_caching_off", "diffusion")

METRICS = (
    Metric(
        "info",
        "gauge",
        "1; what this engine compresses, and how",
        (
            *("version", "policy", "keep", "budget", "prompt_window", "levels", "decode_window"),
            *("profile", "method"),
        ),
    ),
    Metric(
        "weight_bytes",
        "gauge",
        "bytes of the weights, planned from the checkpoint: as published, and as served",
        ("state",),
        ("original", "compressed"),
    ),
    Metric(
        "kv_bytes_per_token",
        "gauge",
        "KV bytes per token of a long prompt: without compression, and once compacted",
        ("state",),
        ("original", "compressed"),
    ),
    Metric(
        "kv_eligible_requests",
        "counter",
        "requests whose prompt was computed, and of which something was compacted",
    ),
    Metric(
        "kv_skipped_requests",
        "counter",
        "requests whose prompt was computed, and of which nothing was compacted, by reason",
        ("reason",),
        ("short_prompt", "nothing_to_evict", "opted_out"),
    ),
    Metric("kv_compactions", "counter", "segments compacted", ("segment",), ("prompt", "window")),
    Metric(
        "kv_tokens",
        "counter",
        "tokens in compacted segments, mean over compressed layers",
        ("policy",),
    ),
    Metric(
        "kv_evicted_tokens",
        "counter",
        "tokens evicted from compacted segments, mean over compressed layers",
        ("policy",),
    ),
    Metric(
        "kv_compaction_seconds",
        "histogram",
        "host time of a step's observing and compacting, all layers",
        buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    ),
    Metric("kv_freed_blocks", "counter", "blocks that compaction gave back to the pool"),
    Metric("kv_freed_bytes", "counter", "bytes that compaction gave back to the pool"),
    Metric(
        "kv_saved_bytes",
        "gauge",
        "bytes that running requests would hold in addition without compression, now",
    ),
    Metric(
        "kv_saved_bytes_peak",
        "gauge",
        "the most that kv_saved_bytes has been since the engine started",
    ),
    Metric(
        "kv_live_tokens_max",
        "gauge",
        "tokens of the blocks that a layer holds of one running request, the most of all, now",
    ),
    Metric(
        "kv_kept_ratio",
        "gauge",
        "share of their blocks that running requests hold, now; 1 without any compaction",
    ),
    Metric("diffusion_steps", "counter", "denoising steps, summed over requests"),
    Metric(
        "diffusion_refreshes",
        "counter",
        "denoising steps that computed every position, from some layer on",
    ),
    Metric(
        "diffusion_token_layers",
        "counter",
        "positions computed, summed over layers and steps, and what all positions would have been",
        ("state",),
        ("computed", "full"),
    ),
    Metric(
        "diffusion_tokens", "counter", "tokens committed, without those that a stop token drops"
    ),
    Metric("diffusion_requests", "counter", "requests denoised to the end"),
    Metric("diffusion_request_steps", "counter", "steps of requests denoised to the end"),
    Metric(
        "refused_requests",
        "counter",
        "requests refused for what they ask of compression, by reason",
        ("reason",),
        REFUSALS,
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
