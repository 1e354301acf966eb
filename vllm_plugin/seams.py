# SPDX-License-Identifier: Apache-2.0
"""What we override or call in vLLM, with the parameters that we rely on.

One list for ``vllm-compress doctor``, which looks at the vLLM of a user, and for the contract
tests, which tell after an upgrade what has moved.
"""

import inspect
from collections.abc import Mapping
from pkgutil import resolve_name

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"
_COMPRESSED = (
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors:"
    "CompressedTensorsConfig"
)
_KERNEL = "vllm.model_executor.kernels.linear"
_LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_MANAGER_OF_WINDOWS = "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_UPDATE = ("layer", "key", "value", "kv_cache", "slot_mapping")
_FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")

# ``module:name`` -> its first parameters, after self or cls.
SEAMS: dict[str, tuple[str, ...]] = {
    # config_edge, guard
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("usage_context", "headless"),
    # quantization/
    f"{_COMPRESSED}.__init__": ("target_scheme_map", "ignore", "quant_format"),
    f"{_COMPRESSED}._get_scheme_from_parts": ("weight_quant", "input_quant"),
    f"{_COMPRESSED}._quantization_scheme_map_from_config": ("config",),
    f"{_COMPRESSED}.get_scheme": ("layer", "layer_name"),
    f"{_COMPRESSED}.get_quant_method": ("layer", "prefix"),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding:"
    "CompressedTensorsEmbeddingWNA16Int.create_weights": (
        *("layer", "input_size_per_partition", "output_partition_sizes", "input_size"),
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.tie_weights": (
        *("layer", "embed_tokens"),
    ),
    "vllm.model_executor.layers.quantization.base_config:"
    "QuantizationConfig.override_quantization_method": ("hf_quant_cfg", "user_quant", "hf_config"),
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes:"
    "CompressedTensorsWNA16.__init__": (
        *("strategy", "num_bits", "group_size", "symmetric", "layer_name"),
    ),
    f"{_KERNEL}:MPLinearKernel.__init__": (
        *("c", "w_q_param_name", "w_s_param_name", "w_zp_param_name"),
    ),
    f"{_KERNEL}:MPLinearKernel.apply_weights": ("layer", "x", "bias"),
    f"{_KERNEL}.mixed_precision.machete:MacheteLinearKernel.can_implement": ("c",),
    f"{_KERNEL}.mixed_precision.marlin:MarlinLinearKernel.can_implement": ("c",),
    "vllm._custom_ops:int4_scaled_mm_cpu": ("x", "w", "w_zeros", "w_scales", "bias"),
    f"{_LOADER}.load_model": ("vllm_config", "model_config", "prefix"),
    f"{_LOADER}.get_all_weights": ("model_config", "model"),
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload": (),
    # kv_cache/
    f"{_MANAGER}.remove_skipped_blocks": (
        *("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    f"{_MANAGER}.cache_blocks": (
        *("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    f"{_MANAGER}.pop_blocks_for_free": ("request_id",),
    f"{_MANAGER}.get_num_blocks_to_allocate": ("request_id", "num_tokens"),
    "vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes": ("vllm_config",),
    f"{_MANAGER}._remove_blocks_in_range": ("request_id", "first_block", "last_block"),
    f"{_MANAGER}.find_longest_cache_hit": (
        *("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"),
    ),
    f"{_MANAGER_OF_WINDOWS}.cache_blocks": (
        *("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    "vllm.v1.attention.backend:AttentionBackend.validate_configuration": (
        *("head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink"),
    ),
    "vllm.platforms.interface:Platform._align_hybrid_block_size": ("vllm_config", "backend_cls"),
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path"),
    "vllm.v1.attention.selector:get_attn_spec_kind": (
        *("use_mla", "has_sliding_window", "attn_type"),
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        *("common_prefix_len", "common_attn_metadata"),
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": _UPDATE,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": _UPDATE,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update": _UPDATE,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": _FORWARD,
    "vllm._custom_ops:rotary_embedding": (
        *("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"),
    ),
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": (),
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec": (),
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": ("kv_cache_config",),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("scheduler_output",),
    # Which steps replay a CUDA graph: runner_v1, runner_v2.
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": (),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state": (
        *("scheduler_output", "dummy_run"),
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding": (
        *("num_tokens", "num_reqs", "num_scheduled_tokens_np", "max_num_scheduled_tokens"),
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support": (
        *("vllm_config", "kv_cache_spec"),
    ),
    # diffusion/
    f"{_SCHEDULER}.schedule": ("throttle_prefills",),
    f"{_SCHEDULER}.update_from_output": ("scheduler_output", "model_runner_output"),
    f"{_SCHEDULER}._update_request_with_output": ("request", "new_token_ids", "is_stale"),
    f"{_SCHEDULER}.add_request": ("request",),
    "vllm.v1.core.sched.utils:check_stop": ("request", "max_model_len"),
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast": ("input_", "src"),
    "vllm.distributed.parallel_state:graph_capture": ("device",),
    "vllm.forward_context:set_forward_context": ("attn_metadata", "vllm_config", "num_tokens"),
    "vllm.model_executor.offloader:get_offloader": (),
    "vllm.utils.gc_utils:freeze_gc_for_cudagraph_capture": (),
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": (),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": (
        *("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build": (
        *("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    "vllm.model_executor.models.llama:LlamaAttention.__init__": (
        *("config", "hidden_size", "num_heads", "num_kv_heads"),
        *("max_position_embeddings", "quant_config"),
    ),
    "vllm.model_executor.models.llama:LlamaMLP.__init__": (
        *("hidden_size", "intermediate_size", "hidden_act", "quant_config"),
    ),
    # metrics/
    f"{_CONNECTOR}.base:KVConnectorBase_V1.__init__": ("vllm_config", "role", "kv_cache_config"),
    f"{_CONNECTOR}.base:KVConnectorBase_V1.bind_kv_cache_manager": ("kv_cache_manager",),
    f"{_CONNECTOR}.base:KVConnectorBase_V1.get_num_new_matched_tokens": (
        *("request", "num_computed_tokens"),
    ),
    f"{_CONNECTOR}.base:KVConnectorBase_V1.build_connector_meta": ("scheduler_output",),
    f"{_SCHEDULER}._mamba_block_aligned_split": ("request", "num_new_tokens"),
    f"{_CONNECTOR}.base:KVConnectorBase_V1.get_kv_connector_stats": (),
    f"{_CONNECTOR}.base:KVConnectorBase_V1.build_kv_connector_stats": ("data",),
    f"{_CONNECTOR}.base:SupportsHMA.request_finished_all_groups": ("request", "block_ids"),
    f"{_CONNECTOR}.metrics:KVConnectorPromMetrics.__init__": (
        *("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    ),
    f"{_CONNECTOR}.metrics:KVConnectorPromMetrics.observe": ("transfer_stats_data", "engine_idx"),
}


def broken_seams(seams: Mapping[str, tuple[str, ...]] = SEAMS) -> list[str]:
    """What differs in the installed vLLM from what we build on.

    Args:
        seams: ``module:name`` and the parameters that it must begin with.

    Returns:
        One line per difference; empty when there is none.
    """
    broken = []
    for name, expected in seams.items():
        try:
            found = tuple(inspect.signature(resolve_name(name)).parameters)
        except (ImportError, AttributeError) as error:
            broken.append(f"{name} is gone ({error})")
            continue
        found = found[1:] if found[:1] in (("self",), ("cls",)) else found
        if found[: len(expected)] != expected:
            broken.append(f"{name} takes {', '.join(found)}; expected {', '.join(expected)}")
    return broken
