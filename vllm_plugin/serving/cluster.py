# SPDX-License-Identifier: Apache-2.0
"""Runs one app on a Ray cluster while a context lasts: on a new cluster, or RAY_ADDRESS's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_plugin.serving.extra import ray_llm

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

APP = "compress"
_OBJECT_STORE = 200 << 20  # bytes; requests and answers are small, the default is a third of memory


@contextmanager
def running_app(config: "LLMConfig", *, host: str, port: int, metrics_port: int) -> Iterator[None]:
    """Serve a model with an OpenAI-compatible API until the context ends.

    Args:
        config: what to serve.
        host: address of the HTTP server, unless the cluster already serves something.
        port: its port.
        metrics_port: port of the agent of a new cluster.

    Raises:
        RuntimeError: no replica comes up.
    """
    llm = ray_llm()
    import ray
    from ray import serve

    connects = bool(os.environ.get("RAY_ADDRESS"))
    if connects:
        ray.init()
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus_needed(config)),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            _metrics_export_port=metrics_port,
        )
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(llm.build_openai_app({"llm_configs": [config]}), name=APP)
        yield
    finally:
        if connects:
            serve.delete(APP)
        else:
            serve.shutdown()
        ray.shutdown()


def cpus_needed(config: "LLMConfig") -> int:
    """Return the cores that Ray counts for all replicas and one ingress. It reserves none."""
    engine: Any = config.get_engine_config()
    ranks = sum(bundle.get("CPU", 0) for bundle in engine.placement_bundles)
    most = config.deployment_config["autoscaling_config"]["max_replicas"]
    return int(most * (ranks + 1)) + 1
