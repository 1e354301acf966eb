# SPDX-License-Identifier: Apache-2.0
"""What ``vllm_plugin/diffusion`` builds on in vLLM: an upgrade that breaks it fails here."""

import dataclasses
import inspect

import pytest
import torch
from vllm.config import SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from vllm_plugin.diffusion.hidden_cache import HiddenCache
from vllm_plugin.diffusion.llada import LLaDAModelLM


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_scheduler_hooks() -> None:
    """diffusion/scheduler.py"""
    assert "scheduler_cls" in names(SchedulerConfig)


def test_scheduler_sizes_steps_by_these_fields() -> None:
    """diffusion/scheduler.py sets num_computed_tokens; the base subtracts it."""
    source = inspect.getsource(Scheduler.schedule)
    assert "self.num_sampled_tokens_per_step" in source
    assert "request.num_tokens - num_computed_tokens" in source  # admission
    assert "not self.scheduler_config.enable_chunked_prefill" in source
    assert "num_new_tokens == 0" in source  # what has nothing to compute is passed over
    assert isinstance(Request.num_tokens, property)
    assert "len(self._all_token_ids)" in inspect.getsource(Request.num_tokens.fget)
    assert "_output_token_ids" in inspect.getsource(Request.num_output_tokens.fget)


def test_worker_takes_the_step() -> None:
    """diffusion/worker.py"""
    assert "if model_output is None" in inspect.getsource(EngineCore.step)  # else: no sampling
    assert {"req_id", "prompt_token_ids", "sampling_params", "block_ids"} <= names(NewRequestData)
    assert {"scheduled_new_reqs", "num_scheduled_tokens", "finished_req_ids"} <= names(
        SchedulerOutput
    )
    assert {"req_ids", "req_id_to_index", "sampled_token_ids", "kv_connector_output"} <= names(
        ModelRunnerOutput
    )
    for method in ("maybe_get_kv_connector_output", "kv_connector_no_forward"):
        assert isinstance(inspect.getattr_static(KVConnectorModelRunnerMixin, method), staticmethod)
    assert {"attn_metadata", "vllm_config", "num_tokens", "slot_mapping"} <= set(
        parameters(set_forward_context)
    )


def test_attention_metadata_is_described_by_these() -> None:
    """diffusion/batch.py"""
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert fields >= {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
        "positions",
    }
    for backend in (CPUAttentionBackend, TritonAttentionBackend):
        assert backend.supports_non_causal()


def test_non_causal_layers_switch_chunks_and_prefix_caching_off() -> None:
    """diffusion/worker.py tags its specs; test_engine.py looks at what it does."""
    assert "non_causal" in names(FullAttentionSpec)
    source = inspect.getsource(EngineCore._initialize_kv_caches)
    assert 'getattr(spec, "non_causal", False)' in source


def test_inputs_and_attention_share_a_group() -> None:
    """diffusion/hidden_cache.py"""
    common = {"block_size": 32, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}
    attention = FullAttentionSpec(**common, non_causal=True)
    inputs = MLAAttentionSpec(
        **(common | {"num_kv_heads": 1, "head_size": 128}), max_tp_shards=1, non_causal=True
    )
    together = UniformTypeKVCacheSpecs.from_specs({"attn": attention, "inputs": inputs})
    assert together is not None
    assert inputs.page_size_bytes == 32 * 128 * 4
    assert together.page_size_bytes == attention.page_size_bytes + inputs.page_size_bytes
    assert issubclass(HiddenCache, AttentionLayerBase)


def test_model_is_made_of_these() -> None:
    """diffusion/llada.py"""
    assert {"orig_to_new_regex", "orig_to_new_stacked"} <= names(WeightsMapper)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("model.transformer.wte.weight", "model.embed_tokens.weight"),
        ("model.transformer.ff_out.weight", "lm_head.weight"),
        ("model.transformer.ln_f.weight", "model.norm.weight"),
        ("model.transformer.blocks.3.k_proj.weight", "model.layers.3.self_attn.qkv_proj.weight"),
        ("model.transformer.blocks.3.attn_out.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.transformer.blocks.3.ff_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.transformer.blocks.3.up_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.transformer.blocks.3.ff_out.weight", "model.layers.3.mlp.down_proj.weight"),
        ("model.transformer.blocks.3.attn_norm.weight", "model.layers.3.input_layernorm.weight"),
    ],
)
def test_published_names(published: str, ours: str) -> None:
    assert LLaDAModelLM.hf_to_vllm_mapper.map_name(published) == ours


def test_engine_arguments_that_are_chosen() -> None:
    """diffusion/support.py"""
    assert names(EngineArgs) >= {
        "async_scheduling",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "scheduler_cls",
        "worker_cls",
        "block_size",
        "compilation_config",
        "kernel_config",
        "override_generation_config",
        "attention_config",
        "hf_config_path",
    }
