# SPDX-License-Identifier: Apache-2.0
"""The figures of a running server, read from its Prometheus endpoint. Imports no vLLM."""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from compress_common.errors import CompressError
from vllm_plugin.commands.address import local_opener
from vllm_plugin.metrics.catalogue import PREFIX

NONE = "none"  # what vllm_compress_info says of something that is not used
_TIMEOUT = 10.0  # seconds
_RAY = "ray_"  # what Ray's agent puts in front of each name
_SHARED_LABELS = {"model_name", "engine"}
# vLLM's own series that belong to the picture.
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTIONS, CACHE_USED = "vllm:num_preemptions_total", "vllm:kv_cache_usage_perc"
_VLLM = (RUNNING, WAITING, PREEMPTIONS, CACHE_USED)


@dataclass
class Figures:
    """What one model of a server reports.

    Attributes:
        model: the name that it is served by.
        info: labels of ``vllm_compress_info``.
        engines: how many report (data parallelism).
        values: by name, without our prefix and ``_total``, and by the value of the label beyond
            ``model_name`` and ``engine`` ("" without one). Summed over engines.
    """

    model: str
    info: dict[str, str]
    engines: int = 0
    values: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def total(self, name: str) -> float:
        """The sum of a metric over its label; 0 if the server does not have it."""
        return sum(value for (found, _), value in self.values.items() if found == name)

    def mean(self, name: str) -> float:
        """The mean of a gauge over engines; 0 if the server does not have it."""
        return self.total(name) / self.engines

    def by_label(self, name: str) -> dict[str, float]:
        """The values of a metric that are not 0, by its label."""
        return {
            label: value for (found, label), value in self.values.items() if found == name and value
        }

    def sizes(self, name: str) -> tuple[float, float] | None:
        """The original and the compressed bytes of one engine; None where they are not known."""
        found = self.by_label(name)
        if not found:
            return None
        return found["original"] / self.engines, found["compressed"] / self.engines

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        metrics: dict[str, Any] = {}
        for (name, label), value in self.values.items():
            if label:
                metrics.setdefault(name, {})[label] = value
            else:
                metrics[name] = value
        return {
            "model": self.model,
            "engines": self.engines,
            "info": self.info,
            "metrics": metrics,
        }


def fetch(url: str) -> str:
    """Return what a server's /metrics says.

    Args:
        url: ``host:port`` or a URL, with or without ``/metrics`` or ``/v1``.

    Raises:
        CompressError: nothing answers there, or not with metrics.
    """
    base = url if "://" in url else f"http://{url}"
    address = base.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    reason: object
    try:
        with _opener(address).open(address, timeout=_TIMEOUT) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
    raise CompressError(
        f"no metrics at {address}: {reason}; give the URL of the server, such as "
        "http://127.0.0.1:8000"
    )


def _opener(address: str) -> urllib.request.OpenerDirector:
    """Reads a URL."""
    local = urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return local_opener() if local else urllib.request.build_opener()


def models_in(text: str, url: str) -> list[Figures]:
    """Return the figures of each model that is compressed.

    Args:
        text: what ``fetch`` returned.
        url: where it is from, for the error.

    Raises:
        CompressError: it is not in Prometheus's format, or nothing there is compressed.
    """
    try:
        samples = [
            (sample.name.removeprefix(_RAY), sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    except ValueError as error:
        raise CompressError(f"{url} does not answer in Prometheus's format: {error}") from error
    models: dict[str, Figures] = {}
    for name, labels, _ in samples:
        if name == f"{PREFIX}info":
            own = {key: value for key, value in labels.items() if key not in _SHARED_LABELS}
            models.setdefault(labels["model_name"], Figures(labels["model_name"], own)).engines += 1
    if not models:
        raise CompressError(
            f"the server at {url} reports no compression: it has no --additional-config.compress "
            "and no --quantization of this plugin, or compress.metrics is false, or the plugin is "
            "not installed there"
        )
    for name, labels, value in samples:
        figures = models.get(labels.get("model_name", ""))
        if figures is None or "le" in labels or name == f"{PREFIX}info":
            continue
        own = {key: value for key, value in labels.items() if key not in _SHARED_LABELS}
        if name in _VLLM:
            figures.values[name, ""] += value
        elif name.startswith(PREFIX):
            short = name.removeprefix(PREFIX).removesuffix("_total")
            figures.values[short, "".join(own.values())] += value
    return list(models.values())
