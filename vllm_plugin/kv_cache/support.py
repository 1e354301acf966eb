# SPDX-License-Identifier: Apache-2.0
"""What KV compression cannot serve, found before a worker starts, and again by the worker."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheSpec

from compress_common.errors import CompressError, joined
from compress_common.structure.wrapper import language_config
from kv_policies.base import Capabilities
from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.tokens import TokenLayout
from vllm_plugin.compatibility import (
    ENCODER,
    MLA,
    SINKS,
    STATE,
    drop_wide_window,
    kv_model_problems,
)
from vllm_plugin.kv_cache import requests
from vllm_plugin.kv_cache.backends import choose_backend, name_cpu_backend
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.kv_cache.hybrid import settle_block_size
from vllm_plugin.kv_cache.latent import latent_problems, no_latents, rope_of
from vllm_plugin.kv_cache.quantized import FP8
from vllm_plugin.kv_cache.requests import KVRequestCheck, UncachedKVRequestCheck
from vllm_plugin.kv_fingerprint import HYBRIDS, full_attention_layers
from vllm_plugin.page_sizes import full_block_size
from vllm_plugin.settings import KVSettings

_CPU_BLOCK = 32
WORKER = "vllm_plugin.kv_cache.worker.CompressedWorker"


def choose_engine_args(args: EngineArgs, settings: KVSettings) -> None:
    """Set the engine arguments that depend on compression and that the user left unset.

    vLLM's default of 128 tokens per block on a CPU would keep far more of a short prompt than asked
    for, because whole blocks are kept. On a GPU, latents would lie in many small pieces in vLLM's
    blocks of 16.
    """
    if args.block_size is None:
        if current_platform.is_cpu():
            args.block_size = _CPU_BLOCK
        elif settings.gpu_block_size is not None:
            args.block_size = settings.gpu_block_size
    name_cpu_backend(args)


def apply_kv(config: VllmConfig, settings: KVSettings, worker: str) -> None:
    """Set our worker class, the attention backend of compressed layers and the check of requests.

    Args:
        config: vLLM's own, of this engine.
        settings: ``compress.kv``.
        worker: ``--worker-cls`` as the user gave it.

    Raises:
        CompressError: lists everything that rules compression out.
    """
    model = config.model_config
    if drop_wide_window(model.hf_text_config, model.max_model_len):
        config.cache_config.sliding_window = None
    model_problems = _model_problems(config, settings)
    problems = config_problems(config, worker) + model_problems
    if settings.latents:
        problems += latent_problems(config)
    layouts: dict[int, Layout] = {}
    steps: list[Callable[[], object]] = [settings.build]
    if not model_problems:
        steps.append(lambda: choose_backend(config))
        steps.append(lambda: settle_block_size(config))
        steps.append(lambda: layouts.update(_layouts(settings, config)))
    for step in steps:
        try:
            step()
        except CompressError as error:
            problems += error.problems
    if problems:
        raise joined(problems)
    config.parallel_config.worker_cls = WORKER
    requests.served = _for_requests(set(layouts.values()), whole=settings.prompt_window is None)
    check = KVRequestCheck if config.cache_config.enable_prefix_caching else UncachedKVRequestCheck
    model.logits_processors = [*(model.logits_processors or []), check]


def _for_requests(layouts: set[Layout], whole: bool) -> requests.Served:
    """What a request may ask for less than: nothing, where layers differ or keep everything."""
    match list(layouts):
        case [TokenLayout(keep=keep)] if keep < 1:
            return requests.Served(keep=keep, whole=whole)
        case [BoundedLayout(budget=budget, window=window)]:
            return requests.Served(budget=budget, least_budget=2 * window, whole=whole)
    return requests.Served(whole=whole)


def _layouts(settings: KVSettings, config: VllmConfig) -> Mapping[int, Layout]:
    """Make the layouts, or raise what rules them out."""
    model = config.model_config
    text = language_config(model.hf_config)
    ranks = config.parallel_config.tensor_parallel_size
    block_size = full_block_size(text, config.cache_config.block_size, ranks)
    made = layouts_of(settings, block_size, model.model, text, ranks)
    longest = model.max_model_len
    if not _ever_frees(made.values(), longest):
        raise CompressError(_nothing_freed(settings, block_size, longest))
    if settings.prompt_window and made and all(x.head(longest) == longest for x in made.values()):
        raise CompressError(
            f"compress.kv.prompt_window is {settings.prompt_window}, and requests have at most "
            f"{longest} tokens (--max-model-len): no prompt would ever be cut; set a smaller "
            "window, or remove it"
        )
    return made


def _ever_frees(layouts: Iterable[Layout], longest: int) -> bool:
    """Whether some request of up to ``longest`` tokens gives back a block; True at keep 1.

    The longest prompt frees the most at its end, the shortest leaves the most for decode windows.
    """
    lossy = {each for each in layouts if each.share < 1}
    prompts = (max(1, longest - 1), 1)
    return not lossy or any(each.freed(n, longest) for each in lossy for n in prompts)


def _nothing_freed(settings: KVSettings, block_size: int, longest: int) -> str:
    if settings.budget:
        asked, change = f"budget is {settings.budget}", "a smaller budget"
    elif settings.keeps_latents:
        asked = f"min_prompt is {settings.min_prompt}"
        change = "a smaller min_prompt, or bases of a larger ratio"
    else:
        keep = "the profile's" if settings.keep is None else f"{float(settings.keep):g}"
        asked = f"keep is {keep}, min_prompt {settings.min_prompt}"
        change = "a smaller keep, min_prompt or min_blocks"
    return (
        f"compress.kv.{asked}, and requests have at most {longest} tokens (--max-model-len) in "
        f"blocks of {block_size}: nothing would ever be compacted; set {change}, or remove "
        "compress.kv"
    )


def _model_problems(config: VllmConfig, settings: KVSettings) -> list[str]:
    """List what rules the model out, by its config and by vLLM's class for it."""
    model = config.model_config
    problems = kv_model_problems(
        language_config(model.hf_config),
        settings.capabilities,
        max_model_len=model.max_model_len,
    )
    if problems:
        return problems
    found = {
        MLA: model.use_mla,
        ENCODER: model.is_encoder_decoder,
        STATE: model.is_attention_free
        or (model.is_hybrid and model.hf_text_config.model_type not in HYBRIDS),
    }
    problems = [f"{problem}; remove compress.kv" for problem, present in found.items() if present]
    if settings.prompt_window and model.is_mm_prefix_lm:
        problems.append(
            "compress.kv.prompt_window: tokens of a picture attend to each other in this model, "
            "and a window would cut them; remove it"
        )
    if settings.latents and model.using_transformers_backend():
        problems.append(
            "vLLM serves this model through transformers, where cskv does not find the rotation of "
            "its keys; choose another policy"
        )
    return problems


def config_problems(config: VllmConfig, chosen_worker: str) -> list[str]:
    """List what rules compression out in an engine's arguments.

    Args:
        config: vLLM's own, of this engine.
        chosen_worker: ``--worker-cls`` as the user gave it.

    Returns:
        One line per problem, with the flag to change.
    """
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    dtype = cache.cache_dtype
    found = {
        f"platform {current_platform.device_name}: KV compression runs on CPU and CUDA": not (
            current_platform.is_cpu() or current_platform.is_cuda()
        ),
        "a pooling model keeps no KV cache; remove compress.kv": (model.runner_type != "generate"),
        f"--kv-cache-dtype {dtype}: caches of 16 bits, or of FP8 with one scale per layer, can be "
        f"compacted; take auto or {', '.join(FP8)}, or remove compress.kv": (
            dtype not in ("auto", "bfloat16", "float16", *FP8)
        ),
        f"--kv-cache-dtype {dtype}: on a CPU vLLM needs AVX-512 or AMX for it, which this one has "
        "not; leave it at auto": dtype in FP8 and lacks_fp8(),
        "--kv-cache-dtype-skip-layers: layers with different caches were never tested; remove it": (
            bool(cache.kv_cache_dtype_skip_layers)
        ),
        "--disable-hybrid-kv-cache-manager: layers that keep different shares need it; remove the "
        "flag": config.scheduler_config.disable_hybrid_kv_cache_manager is True,
        "--kv-transfer-config: the connector would store compacted blocks under the hashes of "
        "whole ones; remove it, or remove compress.kv": config.kv_transfer_config is not None,
        "--speculative-config: a rejected token could lie in a window that was compacted, and "
        "draft layers would join compressed groups; remove it": (
            config.speculative_config is not None
        ),
        "--decode-context-parallel-size or --prefill-context-parallel-size above 1: blocks are "
        "spread over ranks; set them to 1": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "--enable-dbo: a batch in two halves was never tested; remove it": bool(
            parallel.use_ubatching
        ),
        f"--worker-cls {chosen_worker}: KV compression brings its own; remove the flag": (
            chosen_worker not in ("auto", WORKER)
        ),
        "VLLM_USE_RUST_FRONTEND: it does not check what requests ask for, and one that cannot be "
        "served would end the engine; unset it": envs.VLLM_USE_RUST_FRONTEND,
        "--disable-sliding-window: which layers it gives full attention differs by model; remove "
        "it": model.disable_sliding_window
        and "sliding_attention" in (getattr(model.hf_text_config, "layer_types", None) or ()),
        "the second model runner was never tested on a CPU; unset VLLM_USE_V2_MODEL_RUNNER": (
            current_platform.is_cpu() and config.use_v2_model_runner
        ),
    }
    return [problem for problem, present in found.items() if present]


def lacks_fp8() -> bool:
    """Whether this is a CPU on which vLLM has no FP8 cache."""
    fast = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    return current_platform.is_cpu() and not fast


def layer_problems(
    specs: Mapping[str, KVCacheSpec],
    full: Mapping[str, int],
    layers: Mapping[str, Any],
    config: Any,
    stage: range,
    policy: Capabilities,
    latents_of: torch.nn.Module | None = None,
) -> list[str]:
    """List what rules compression out once the model's layers exist.

    The config edge has asked the config already. This is the last guard, against a model whose
    layers are not what its config says.

    Args:
        specs: KV-cache specs of all layers, by name.
        full: the full-attention layers among them, with their index in the model.
        layers: the attention layers, by name.
        config: the text model's.
        stage: the layers of the model that this worker has. With pipeline parallelism a stage can
            be without a full-attention layer.
        policy: what it needs and offers.
        latents_of: the model, if kept blocks are latents.

    Returns:
        One line per problem; empty when there is none.
    """
    expected = set(full_attention_layers(config)).intersection(stage)
    if not full and len(stage) == config.num_hidden_layers:
        kinds = ", ".join(sorted({type(spec).__name__ for spec in specs.values()}))
        return [f"no full-attention layer, all layers are {kinds}; remove compress.kv"]
    problems = []
    if unlike := sorted(expected.symmetric_difference(full.values())):
        problems.append(
            f"vLLM and the model's config differ on which layers have full attention: layers "
            f"{', '.join(map(str, unlike))}; remove compress.kv"
        )
    shapes = {(s.num_kv_heads, s.head_size, s.head_size_v) for s in (specs[name] for name in full)}
    if len(shapes) > 1 or any(size != values for _, size, values in shapes):
        problems.append(
            "layers differ in their heads, or in the sizes of keys and values: (KV heads, key, "
            f"value) are {', '.join(map(str, sorted(shapes)))}; remove compress.kv"
        )
    for name in full:
        impl = layers[name].impl
        if layers[name]._k_scale.numel() > 1 or layers[name]._v_scale.numel() > 1:
            problems.append(
                f"layer {name} has an FP8 cache with a scale per head, and a policy scores it with "
                "one per layer; serve with --kv-cache-dtype bfloat16"
            )
        for what in ("alibi_slopes", "kv_sharing_target_layer_name"):
            if getattr(impl, what, None) is not None:
                problems.append(f"layer {name} has {what}, which no policy knows")
        if getattr(impl, "sinks", None) is not None and not policy.serves_sinks:
            problems.append(f"layer {name}: {SINKS}; remove compress.kv")
        if latents_of is not None:
            if layers[name].kv_cache_dtype in FP8:
                problems.append(f"layer {name}: {no_latents(layers[name].kv_cache_dtype)}")
            if getattr(impl, "logits_soft_cap", None):
                problems.append(f"layer {name} caps its logits, which latents do not; use snap_kv")
            try:
                rope_of(latents_of, name)
            except CompressError as error:
                problems += error.problems
    return problems
