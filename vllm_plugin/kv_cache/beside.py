# SPDX-License-Identifier: Apache-2.0
"""What an engine's config says of the memory that compaction takes beside the KV cache."""

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from compress_common.structure.wrapper import language_config
from kv_policies.base import KVPolicy
from kv_policies.layout.base import Layout
from kv_policies.memory import Beside, Load, beside_cache
from kv_policies.workspace import Heads
from vllm_plugin.kv_cache.quantized import FP8
from vllm_plugin.kv_fingerprint import fingerprint_of


def load_of(config: VllmConfig) -> Load:
    """What an engine has to do at most.

    The scheduler gives the first prompt what is left of a step's tokens, unless it may take only so
    many. The others get a share too then, so that several can be incomplete after a step.
    """
    scheduler = config.scheduler_config
    each = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
    if config.model_config.is_hybrid:  # it cuts prompts at blocks, and the next gets the rest
        each = min(each, config.cache_config.block_size)
    prompts = min(scheduler.max_num_seqs, -(-scheduler.max_num_batched_tokens // each))
    fp8 = scheduler.max_num_batched_tokens if config.cache_config.cache_dtype in FP8 else 0
    return Load(config.model_config.max_model_len, prompts, scheduler.max_num_seqs, fp8)


def beside_of(
    config: VllmConfig, policy: KVPolicy, layouts: Mapping[int, Layout], stage: range
) -> Beside:
    """What each rank of a pipeline stage keeps free.

    Args:
        config: Of the engine.
        policy: What scores.
        layouts: By layer.
        stage: The layers of the stage.
    """
    model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
    shape = fingerprint_of(model.model, language_config(model.hf_config))
    kv, itemsize = max(1, shape.num_key_value_heads // ranks), model.dtype.itemsize
    if config.cache_config.cache_dtype in FP8:
        itemsize += 1
    device = "cpu" if current_platform.is_cpu() else "cuda"
    group = shape.num_attention_heads // ranks // kv
    heads = Heads(kv, group, shape.head_dim, itemsize, device)
    here = [layout for layer, layout in layouts.items() if layer in stage]
    return beside_cache(policy, here, heads, load_of(config), model.dtype)
