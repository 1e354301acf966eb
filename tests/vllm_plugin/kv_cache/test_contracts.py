# SPDX-License-Identifier: Apache-2.0
"""What ``vllm_plugin/kv_cache`` builds on in vLLM: an upgrade that breaks it fails here."""

import dataclasses
import inspect
import random
from fractions import Fraction

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_worker import Worker

from kv_policies.layout.tokens import TokenLayout
from tests.support.grouping import get_kv_cache_groups
from vllm_plugin.kv_cache.cpu import CPUBackend
from vllm_plugin.kv_cache.flash import FlashBackend
from vllm_plugin.kv_cache.manager import CompressedManager, register
from vllm_plugin.kv_cache.runner_v1 import CompressedRunnerV1
from vllm_plugin.kv_cache.runner_v2 import CompressedRunnerV2
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.triton import TritonBackend


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def spec(cls: type = FullAttentionSpec, **fields: object) -> KVCacheSpec:
    return cls(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16, **fields)


def config() -> VllmConfig:
    resolved = VllmConfig()
    resolved.cache_config.kv_cache_layout = "LBHNC"  # the CPU's
    return resolved


def compressed(share: Fraction) -> CompressedSpec:
    return CompressedSpec.of(spec(), TokenLayout(32, share))


def test_built_in_specs_stay_registered_beside_ours() -> None:
    """kv_cache/spec.py"""
    register()
    register()
    assert KVCacheSpecRegistry.get_manager_class(compressed(Fraction(1, 2))) is CompressedManager
    assert KVCacheSpecRegistry.get_manager_class(spec()) is FullAttentionManager
    window = spec(SlidingWindowSpec, sliding_window=64)
    assert KVCacheSpecRegistry.get_manager_class(window).__name__ == "SlidingWindowManager"


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_one_group_per_layout(levels: int, order: str) -> None:
    """kv_cache/spec.py: what makes per-layer budgets save memory"""
    shares = [Fraction(1 + level, 10) for level in range(levels) for _ in range(30 // levels)]
    if order == "mixed":
        random.Random(0).shuffle(shares)
    specs = {f"model.layers.{at}.attn": compressed(share) for at, share in enumerate(shares)}
    groups = get_kv_cache_groups(config(), specs)
    assert [len(group.layer_names) for group in groups] == [30 // levels] * levels
    for group in groups:
        assert isinstance(group.kv_cache_spec, CompressedSpec)
        assert {specs[name] for name in group.layer_names} == {group.kv_cache_spec}


def test_sliding_windows_keep_their_own_group() -> None:
    """kv_cache/worker.py leaves them alone"""
    window = spec(SlidingWindowSpec, sliding_window=64)
    specs = {f"{at}": compressed(Fraction(1, 4)) if at % 2 else window for at in range(10)}
    groups = get_kv_cache_groups(config(), specs)
    kinds = {type(group.kv_cache_spec): len(group.layer_names) for group in groups}
    assert kinds == {SlidingWindowSpec: 5, CompressedSpec: 5}


def test_metadata_fields() -> None:
    """kv_cache/backend.py, kv_cache/batch.py"""
    assert names(CommonAttentionMetadata) >= {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
        "req_idx",
        "_num_computed_tokens_cache",
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "impl"),
    [
        (CPUBackend, CPUAttentionBackend, CPUAttentionBackendImpl),
        (FlashBackend, FlashAttentionBackend, FlashAttentionImpl),
        (TritonBackend, TritonAttentionBackend, TritonAttentionImpl),
    ],
)
def test_backends(ours: type, theirs: type, impl: type) -> None:
    """kv_cache/cpu.py, flash.py, triton.py: the cache is written before forward is called"""
    assert theirs.forward_includes_kv_cache_update is False
    assert not getattr(ours, "supports_kv_cache_update_bypass", False)  # vLLM 0.33
    assert issubclass(ours.get_impl_cls(), impl)
    assert issubclass(ours.get_builder_cls(), theirs.get_builder_cls())
    assert ours.get_builder_cls().supports_update_block_table is False


def test_worker_hooks() -> None:
    """kv_cache/worker.py"""
    assert issubclass(CPUWorker, Worker)
    assert {"scheduled_new_reqs", "finished_req_ids"} <= names(SchedulerOutput)
    assert {"req_id", "sampling_params"} <= names(NewRequestData)


@pytest.mark.parametrize("ours", [CompressedRunnerV1, CompressedRunnerV2])
def test_runners(ours: type) -> None:
    """kv_cache/runner_v1.py, runner_v2.py: vLLM builds their bases, and asks what they override."""
    (theirs,) = ours.__bases__
    built = inspect.getsource(Worker._make_model_runner)
    assert f"from {theirs.__module__} import" in built
    assert "self._make_model_runner()" in inspect.getsource(Worker._init_workspace_and_model_runner)
    step = inspect.getsource(theirs.execute_model)
    if ours is CompressedRunnerV1:
        assert "self._determine_batch_execution_and_padding(" in step
        assert "force_uniform_decode" not in step  # so that it is None, unlike in dummy runs
    else:
        assert "self.gather_batch_req_state(" in step and "uniform_tok_count," in step


def test_prompt_lengths_of_both_runners() -> None:
    """kv_cache/batch.py"""
    first = inspect.getsource(InputBatch)
    for attribute in ("num_prompt_tokens_cpu_tensor", "num_computed_tokens_cpu_tensor"):
        assert f"self.{attribute} = " in first
    assert isinstance(InputBatch.req_ids, property) and isinstance(InputBatch.num_reqs, property)
    second = inspect.getsource(RequestState.__init__)
    for attribute in ("prompt_len", "num_computed_tokens_np", "index_to_req_id"):
        assert f"self.{attribute}" in second
