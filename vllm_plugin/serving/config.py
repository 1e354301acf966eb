# SPDX-License-Identifier: Apache-2.0
"""Makes the ``LLMConfig`` of a compressed model, and checks it before any cluster sees it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress_common.errors import CompressError
from vllm_plugin.serving.arguments import checked_section, refuse_unknown
from vllm_plugin.serving.environment import environment
from vllm_plugin.serving.extra import ray_llm
from vllm_plugin.settings import KEY

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

SERVER = "vllm_plugin.serving.server:FailFastServer"
ROUTER = {
    "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
    # By default a popular prefix stays on one replica however long its queue is, and the router
    # never forgets a prompt.
    "request_router_kwargs": {"imbalanced_threshold": 8, "do_eviction": True},
}


def llm_config(
    model: str | Path,
    *,
    model_id: str | None = None,
    quantization: str | None = None,
    compress: Mapping[str, Any] | None = None,
    device: Literal["auto", "cpu", "gpu"] = "auto",
    tensor_parallel_size: int = 1,
    replicas: int | tuple[int, int] = 1,
    target_requests: int = 32,
    prefix_aware: bool | None = None,
    cpus: int = 1,
    engine_kwargs: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> "LLMConfig":
    """Return the configuration of one model for ``ray.serve.llm.build_openai_app``.

    Change on the result what has no argument here, such as ``deployment_config``.

    Args:
        model: a hub id, or a folder that every node has.
        model_id: the name for clients; None: the folder's name, or the hub id.
        quantization: as ``--quantization``.
        compress: the ``compress`` section of ``--additional-config``.
        device: ``auto`` is what this vLLM was built for.
        tensor_parallel_size: ranks of each engine.
        replicas: a number, or the fewest and the most.
        target_requests: Ray starts another replica when each has more running on average.
        prefix_aware: send a prompt to the replica that has its prefix cached; None: when there can
            be several replicas.
        cpus: cores for each rank of an engine on a CPU.
        engine_kwargs: vLLM's other engine arguments.
        env: environment variables of replicas and engines.

    Raises:
        CompressError: the settings cannot work, or Ray is not installed.
    """
    arguments = dict(engine_kwargs or {})
    own = {"quantization": quantization, "tensor_parallel_size": tensor_parallel_size}
    for key in [*own, "model", "served_model_name"]:
        if key in arguments:
            raise CompressError(f"engine_kwargs: {key!r} is an argument of llm_config; move it")
    others = arguments.get("additional_config") or {}
    if not isinstance(others, Mapping):
        raise CompressError(f"engine_kwargs: additional_config must be a mapping, got {others!r}")
    if KEY in others:
        raise CompressError(f"engine_kwargs: additional_config has {KEY!r}; give it as `compress`")
    section = checked_section(
        dict(compress or {}), dict(others), quantization, tensor_parallel_size
    )
    least, most = _replicas(replicas)
    if min(tensor_parallel_size, cpus, target_requests) < 1:
        raise CompressError("tensor_parallel_size, cpus and target_requests are 1 or more")

    arguments |= {key: value for key, value in own.items() if value is not None}
    if section:
        arguments["additional_config"] = dict(others) | {KEY: section}
    llm = ray_llm()
    refuse_unknown(arguments)
    on_cpu = _on_cpu(device)
    folder = Path(model).expanduser()
    scaling = {"min_replicas": least, "max_replicas": most}
    if most > least:  # Ray's own default never starts another one
        scaling["target_ongoing_requests"] = target_requests
    # Ray notices at the next check that a replica is gone.
    deployment: dict[str, Any] = {
        "autoscaling_config": scaling,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
    }
    if most > 1 if prefix_aware is None else prefix_aware:
        deployment["request_router_config"] = ROUTER
    fields: dict[str, Any] = {
        "model_loading_config": {
            "model_id": model_id or (folder.resolve().name if folder.is_dir() else str(model)),
            "model_source": str(folder.resolve()) if folder.is_dir() else str(model),
        },
        "accelerator_config": {"kind": "cpu" if on_cpu else "gpu"},
        "deployment_config": deployment,
        "engine_kwargs": arguments,
        "runtime_env": {"env_vars": environment(dict(env or {}), cpus if on_cpu else None)},
        "server_cls": SERVER,
    }
    if on_cpu:
        fields["placement_group_config"] = {"bundle_per_worker": {"CPU": cpus}}
    try:
        config = llm.LLMConfig(**fields)
        config.get_engine_config()  # refuses engine arguments that vLLM does not have
    except ValueError as error:
        raise CompressError(f"Ray refuses this configuration: {error}") from error
    return config


def _replicas(replicas: int | tuple[int, int]) -> tuple[int, int]:
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 0 <= least <= most or most < 1:
        raise CompressError(
            f"replicas {least} to {most}: the most is 1 or more, the fewest 0 or more and no more"
        )
    return least, most


def _on_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "gpu"):
        raise CompressError(f"device {device!r} is none of auto, cpu, gpu")
    if device == "auto":
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())
    return device == "cpu"
