# SPDX-License-Identifier: Apache-2.0
"""Which models are served by denoising, with which settings, and what rules that out."""

from copy import copy
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from compress_common.errors import CompressError, joined
from dllm_denoising.base import CachePolicy
from vllm_plugin.diffusion.config import LLaDAConfig, config_problems
from vllm_plugin.diffusion.names import MODEL_TYPE
from vllm_plugin.diffusion.requests import UNSUPPORTED, check_requests
from vllm_plugin.diffusion.settings import DiffusionSettings
from vllm_plugin.kv_cache.backends import FULL, best
from vllm_plugin.settings import parse_settings

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown

WORKER = "vllm_plugin.diffusion.worker.DiffusionWorker"
SCHEDULER = "vllm_plugin.diffusion.scheduler.DiffusionScheduler"
_CPU_BLOCK = 32
# The worker captures graphs of its own steps. vLLM's would be of decode steps.
_OFF: dict[str, Any] = {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.NONE}


def denoises(config: VllmConfig) -> bool:
    """Whether the model is one that this package serves by denoising."""
    return getattr(config.model_config.hf_config, "model_type", None) == MODEL_TYPE


def model_type_of(args: EngineArgs) -> str | None:
    """The ``model_type`` of a checkpoint's config, before vLLM reads it; None if it has none.

    Only called with ``compress.diffusion``: vLLM refuses some of the models that we know by name,
    and then nobody would learn why.
    """
    try:
        found, _ = PretrainedConfig.get_config_dict(
            args.hf_config_path or args.model, revision=args.revision
        )
    except (OSError, ValueError):
        return None  # vLLM says what is wrong with it
    return found.get("model_type")


def settings_of(config: VllmConfig) -> DiffusionSettings:
    """Return ``compress.diffusion``, or its defaults."""
    return parse_settings(config.additional_config).diffusion or DiffusionSettings()


def diffusion_of(config: VllmConfig) -> DiffusionSettings | None:
    """Return how a model that denoises is served; None for any other model."""
    return settings_of(config) if isinstance(config.model_config.hf_config, LLaDAConfig) else None


def policy_of(config: VllmConfig) -> CachePolicy:
    """Build a policy as the server is configured."""
    return settings_of(config).build()


def choose_engine_args(args: EngineArgs) -> None:
    """Set the engine arguments that depend on denoising and that the user left unset."""
    for name, value in {
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "scheduler_cls": SCHEDULER,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.worker_cls == "auto":
        args.worker_cls = WORKER
    if current_platform.is_cpu() and args.block_size is None:
        args.block_size = _CPU_BLOCK
    # Copies, as the caller can use the same objects for another engine.
    args.attention_config = replace(args.attention_config, use_non_causal=True)
    args.compilation_config = copy(args.compilation_config)
    for name, off in _OFF.items():
        if getattr(args.compilation_config, name) is None:
            setattr(args.compilation_config, name, off)
    args.kernel_config = copy(args.kernel_config)
    args.kernel_config.enable_jit_warmup = False  # it decodes made-up requests
    # Greedy, as the published model is decoded. A generation_config.json sets defaults that no
    # client asked for; None removes such a default.
    neutral: dict[str, Any] = {name: None for name in UNSUPPORTED} | {"temperature": 0.0}
    args.override_generation_config = neutral | args.override_generation_config


def apply_diffusion(config: VllmConfig, settings: DiffusionSettings | None) -> None:
    """Check an engine whose model denoises.

    Raises:
        CompressError: lists everything that rules it out.
    """
    served = settings or DiffusionSettings()
    problems = _problems(config)
    try:
        served.build()
        served.decoding()
    except CompressError as error:
        problems += error.problems
    try:
        _choose_backend(config)
    except CompressError as error:
        problems += error.problems
    if problems:
        raise joined(problems)
    check_requests(config, served)
    _tell_unused_defaults(config.model_config)


def _choose_backend(config: VllmConfig) -> None:
    """On CUDA, take a backend whose metadata is tensors alone, which a graph can read again.

    Raises:
        CompressError: The user named another one, or none serves this model on this device.
    """
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        assert capability is not None
        found = best(config, capability, "denoising", "serve the model on another device")
        config.attention_config.backend_per_kind |= {FULL: found}


def _tell_unused_defaults(model: ModelConfig) -> None:
    """Log which sampling defaults of a checkpoint requests do not get."""
    defaults = model.try_get_generation_config() if model.generation_config != "vllm" else {}
    unused = [
        f"{name} {value!r}"
        for name, value in defaults.items()
        if name in UNSUPPORTED and value not in (None, *UNSUPPORTED[name])
    ]
    if unused:
        logger.info(
            "Sampling defaults of generation_config.json that a diffusion model does not support "
            "are not used: %s",
            ", ".join(unused),
        )


def _problems(config: VllmConfig) -> list[str]:
    model, parallel = config.model_config, config.parallel_config
    scheduler = config.scheduler_config
    kv = parse_settings(config.additional_config).kv
    found: dict[str, Any] = {
        "compress.kv: its policies are made for caches that grow token by token; remove the "
        "section": kv is not None,
        f"platform {current_platform.device_name}: denoising runs on CPU and CUDA": not (
            current_platform.is_cpu() or current_platform.is_cuda()
        ),
        f"--worker-cls {parallel.worker_cls}: denoising brings its own; remove the flag": (
            parallel.worker_cls != WORKER
        ),
        f"--scheduler-cls {scheduler.scheduler_cls}: denoising brings its own; remove the flag": (
            scheduler.scheduler_cls != SCHEDULER
        ),
        "--async-scheduling: the size of a step is known when the last one has ended; remove the "
        "flag": scheduler.async_scheduling,
        "--enable-prefix-caching: keys and values of a prompt depend on what follows it; remove "
        "the flag": config.cache_config.enable_prefix_caching,
        f"--max-num-batched-tokens {scheduler.max_num_batched_tokens}: a refresh computes a whole "
        f"request in one step, here up to --max-model-len {model.max_model_len}; raise one or "
        "lower the other": scheduler.max_num_batched_tokens < model.max_model_len,
        f"--kv-cache-dtype {config.cache_config.cache_dtype}: leave it at auto": (
            config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16")
        ),
        "--speculative-config: several tokens are committed per step already; remove it": (
            config.speculative_config is not None
        ),
        "--enable-lora was never tested with a diffusion model; remove it": (
            config.lora_config is not None
        ),
        "--kv-transfer-config: cached keys and values are only good for one canvas; remove it": (
            config.kv_transfer_config is not None
        ),
        "--pipeline-parallel-size above 1: all layers of a step run in one process; use "
        "--tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size or --prefill-context-parallel-size above 1: blocks are "
        "spread over ranks; set them to 1": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}: a step computes "
        "all of a canvas or none of it; remove the flag": (
            scheduler.long_prefill_token_threshold > 0
        ),
    }
    for name, off in _OFF.items():
        if (mode := getattr(config.compilation_config, name)) != off:
            found[
                f"--compilation-config with {name} {mode.name}: vLLM compiles and captures decode "
                "steps, and the worker captures denoising steps by itself; remove it"
            ] = True
    for name, value in model.override_generation_config.items():
        if value not in (None, *UNSUPPORTED.get(name, (value,))):
            found[
                f"--override-generation-config has {name} {value!r}, which is not supported by a "
                "diffusion model; remove it"
            ] = True
    problems = [problem for problem, present in found.items() if present]
    if not isinstance(model.hf_config, LLaDAConfig):
        problems.append(
            f"the config of this model was read as {type(model.hf_config).__name__}, which another "
            "package or remote code registered; remove --trust-remote-code"
        )
    else:
        problems += config_problems(model.hf_config)
    return problems
