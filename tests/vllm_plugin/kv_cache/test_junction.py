# SPDX-License-Identifier: Apache-2.0
"""Prefix hits of windows beside compressed layers, with vLLM's own cache manager and requests."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from kv_policies.layout.tokens import TokenLayout
from tests.vllm_plugin.kv_cache.test_manager import BLOCK, BLOCKS, free, request, start
from vllm_plugin.kv_cache.junction import Junction
from vllm_plugin.kv_cache.manager import register
from vllm_plugin.kv_cache.spec import CompressedSpec

WINDOW = 40
QUARTER = TokenLayout(BLOCK, Fraction(1, 4))
SHAPE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.bfloat16}


def make(layout: TokenLayout = QUARTER, windows: bool = True) -> tuple[KVCacheManager, Junction]:
    """A cache of compressed layers, with others that have windows; as vLLM keeps these."""
    register()
    init_none_hash(sha256)
    specs = [CompressedSpec.of(FullAttentionSpec(**SHAPE), layout)]
    if windows:
        specs.append(SlidingWindowSpec(**SHAPE, sliding_window=WINDOW))
    groups = [KVCacheGroupSpec([f"layer.{at}"], spec) for at, spec in enumerate(specs)]
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=groups,
        prefix_cache_retention_interval=0,
    )
    manager = KVCacheManager(
        config,
        max_model_len=4096,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=True,
    )
    return manager, Junction(manager.coordinator.single_type_managers)


def serve(manager: KVCacheManager, name: str, prompt: list[int], junction: Junction | None) -> int:
    """Run a request to its end; the tokens that it hit."""
    one = request(name, prompt)
    if junction is not None:
        junction.tell(one)
    hit = start(manager, one)
    manager.free(one)
    return hit


@given(st.integers(1, 900), st.integers(0, 200))
@settings(deadline=None, max_examples=40)
def test_a_repeated_prompt_hits_what_the_compressed_layers_hit(tokens: int, more: int) -> None:
    manager, junction = make()
    before, prompt = free(manager), list(range(tokens))
    assert serve(manager, "a", prompt, junction) == 0
    limit = QUARTER.hit_limit(tokens)
    assert serve(manager, "b", prompt, junction) == limit
    longer = [*prompt, *range(5000, 5000 + more)]
    assert serve(manager, "c", longer, junction) == min(limit, QUARTER.hit_limit(tokens + more))
    assert free(manager) == before


def test_without_a_junction_it_hits_nothing() -> None:
    manager, _ = make()
    prompt = list(range(600))
    assert serve(manager, "a", prompt, None) == serve(manager, "b", prompt, None) == 0


def test_what_vllm_has_seen_stays() -> None:
    """A boundary at which another request went on is proven; ours is a guess."""
    manager, junction = make()
    one = request("a", list(range(600)))
    one.shared_prefix_boundary = 64
    junction.tell(one)
    assert one.shared_prefix_boundary == 64


@pytest.mark.parametrize(
    ("layout", "windows"), [(TokenLayout(BLOCK, Fraction(1)), True), (QUARTER, False)]
)
def test_nothing_is_told_where_nothing_is_lost(layout: TokenLayout, windows: bool) -> None:
    """At keep 1 vLLM's own boundary is right, and without windows none is needed."""
    _, junction = make(layout, windows)
    one = request("a", list(range(600)))
    junction.tell(one)
    assert one.shared_prefix_boundary == 0
