# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's attention backends the compressed layers run over.

A compressed layer runs our classes over one of vLLM's backends (``flash.py``, ``triton.py``,
``cpu.py``). On CUDA, vLLM's own checks choose among those in ``CHOICES``, by device, head size and
type of numbers. Only layers with full attention are meant: sliding-window layers of the same model
keep the backend that vLLM chooses for them.

The choice is made at the config edge, where it can be refused, and is written to
``attention_config.backend_per_kind``. The worker then registers our class as CUSTOM, and names that
instead. CUSTOM is a name of the whole process, so it is reserved: a plugin that has registered its
own class there is refused.
"""

from typing import Final

import vllm.envs as envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from compress_common.errors import CompressError
from vllm_plugin.compatibility import has_sinks

FULL: Final = KVCacheSpecKind.FULL_ATTENTION.value
_CPU: Final = "vllm_plugin.kv_cache.cpu.CPUBackend"
# What vLLM's backends are on CUDA, best first, and our class for each. FLASHINFER, vLLM's choice on
# Blackwell, is not among them: it plans from lengths on the host that count freed tokens.
CHOICES: Final = {
    AttentionBackendEnum.FLASH_ATTN: "vllm_plugin.kv_cache.flash.FlashBackend",
    AttentionBackendEnum.TRITON_ATTN: "vllm_plugin.kv_cache.triton.TritonBackend",
}
_NAMES: Final = " or ".join(choice.name for choice in CHOICES)


def name_cpu_backend(args: EngineArgs) -> None:
    """On a CPU, name the only backend that there is, where the user named none.

    vLLM caches its choice by name, so that an engine that ran in this process before would
    otherwise choose for this one.
    """
    unset = args.attention_backend is None and args.attention_config.backend is None
    if current_platform.is_cpu() and unset:
        args.attention_backend = AttentionBackendEnum.CPU_ATTN


def choose_backend(config: VllmConfig) -> None:
    """Write the backend of compressed layers to an engine's config.

    Raises:
        CompressError: The backend that the user named is not in ``CHOICES``, or cannot serve this
            model on this device; or none can.
    """
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        assert capability is not None
        attention = config.attention_config
        attention.backend_per_kind |= {FULL: chosen(config, capability)}
    elif (named := config.attention_config.backend) is not AttentionBackendEnum.CPU_ATTN:
        raise CompressError(
            f"--attention-backend {named and named.name}: on a CPU there is only CPU_ATTN; remove "
            "the flag"
        )


def chosen(config: VllmConfig, capability: DeviceCapability) -> AttentionBackendEnum:
    """The backend of compressed layers on a CUDA device; see ``choose_backend``."""
    _check_custom_is_free(config)
    return best(config, capability, "KV compression", "remove compress.kv")


def best(
    config: VllmConfig, capability: DeviceCapability, purpose: str, remedy: str
) -> AttentionBackendEnum:
    """The first backend of ``CHOICES``, or that which the user named, that serves a model.

    Args:
        config: vLLM's own, of this engine.
        capability: Of the device.
        purpose: What runs over the backend, for messages.
        remedy: What the user can do where none can serve it, for messages.

    Raises:
        CompressError: see ``choose_backend``.
    """
    attention = config.attention_config
    named = attention.backend_per_kind.get(FULL, attention.backend)
    if named is not None and named not in CHOICES:
        raise CompressError(
            f"--attention-backend {named.name}: {purpose} runs over {_NAMES}; name one of these, "
            "or remove the flag"
        )
    wanted = CHOICES if named is None else (named,)
    reasons = {backend: _reasons(backend, config, capability) for backend in wanted}
    for backend, against in reasons.items():
        if not against:
            return backend
    said = "; ".join(f"{name.name}: {', '.join(against)}" for name, against in reasons.items())
    raise CompressError(
        f"{purpose} needs the attention backend {_NAMES}, and vLLM cannot use "
        f"{'it' if named else 'them'} here ({said}); "
        f"{'remove --attention-backend' if named else remedy}"
    )


def selector_config(config: VllmConfig) -> AttentionSelectorConfig:
    """What vLLM asks of the backend of a full-attention layer: as its ``get_attn_backend``.

    A layer adds what only the loaded model knows. Of that, attention sinks are told here from the
    model's config.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    drafts = config.speculative_config
    return AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        has_sink=has_sinks(model.hf_text_config),
        use_mm_prefix=model.is_mm_prefix_lm,
        use_non_causal=config.attention_config.use_non_causal,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_kv_connector=True,  # the plugin's own, for metrics, which is not configured yet
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_adaptive_verification=drafts is not None and drafts.enable_adaptive_verification,
        use_dcp=parallel.decode_context_parallel_size > 1,
        use_rswa=model.rswa_window is not None,
    )


def _reasons(
    backend: AttentionBackendEnum, config: VllmConfig, capability: DeviceCapability
) -> list[str]:
    """Why vLLM cannot use a backend, by its own check; empty where it can."""
    wanted = selector_config(config)._asdict()
    try:
        with set_current_vllm_config(config):  # which version of FlashAttention, for instance
            return backend.get_class().validate_configuration(
                device_capability=capability, **wanted
            )
    except (ImportError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


def _check_custom_is_free(config: VllmConfig) -> None:
    """vLLM has one class per name in a process, and finds ours by the name CUSTOM.

    Raises:
        CompressError: It stands for another class already, or other layers would get ours.
    """
    custom, attention = AttentionBackendEnum.CUSTOM, config.attention_config
    if custom.is_overridden() and (path := custom.get_path()) not in CHOICES.values():
        raise CompressError(
            f"the attention backend CUSTOM is {path} in this process, and compressed layers need "
            "that name; remove the plugin that registers it, or compress.kv"
        )
    kinds = [kind for kind, named in attention.backend_per_kind.items() if named is custom]
    if attention.backend is custom or kinds:
        flag = "attention_config.backend_per_kind" if kinds else "--attention-backend"
        raise CompressError(
            f"{flag} CUSTOM: that name is reserved for compressed layers; remove the flag"
        )


def put_ours_behind(config: VllmConfig) -> str:
    """Make vLLM find our class for compressed layers, in a worker before it loads the model.

    Returns:
        The class, as ``module.name``.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, _CPU)
        return _CPU
    return put_behind_custom(config)


def put_behind_custom(config: VllmConfig) -> str:
    """``put_ours_behind`` on CUDA: FLASH_ATTN and TRITON_ATTN stay vLLM's own."""
    per_kind = config.attention_config.backend_per_kind
    ours = CHOICES.get(per_kind[FULL])
    if ours is not None:  # else an earlier worker has changed this config already
        _check_custom_is_free(config)
        register_backend(AttentionBackendEnum.CUSTOM, ours)
        per_kind[FULL] = AttentionBackendEnum.CUSTOM
    return AttentionBackendEnum.CUSTOM.get_path()
