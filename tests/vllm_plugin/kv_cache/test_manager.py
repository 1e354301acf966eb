# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side alone, with vLLM's own cache manager, pool and requests."""

from collections.abc import Sequence
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.tokens import TokenLayout
from tests.support.layout_sim import live_columns
from vllm_plugin.kv_cache.manager import register
from vllm_plugin.kv_cache.spec import CompressedSpec

BLOCK = 16
BLOCKS = 400
LONGEST, CHUNK = 8192, 512  # tokens of a request, and of a step


def make(layouts: Sequence[Layout], caching: bool = True) -> KVCacheManager:
    register()
    init_none_hash(sha256)
    plain = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    groups = [
        KVCacheGroupSpec([f"layer.{index}"], CompressedSpec.of(plain, layout, LONGEST, CHUNK))
        for index, layout in enumerate(layouts)
    ]
    return KVCacheManager(
        KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=LONGEST,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
    )


def request(name: str, prompt: list[int], **extra: object) -> Request:
    return Request(
        name,
        prompt,
        SamplingParams(max_tokens=500, extra_args=extra or None),
        None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def free(manager: KVCacheManager) -> int:
    return manager.block_pool.get_num_free_blocks()


def start(manager: KVCacheManager, one: Request) -> int:
    """Admit a request as the scheduler does, its whole prompt in one step; tokens that hit."""
    blocks, hit, _ = manager.get_computed_blocks(one)
    assert manager.allocate_slots(one, one.num_tokens - hit, hit, blocks) is not None
    one.num_computed_tokens = one.num_tokens
    return hit


def decode(manager: KVCacheManager, one: Request, in_flight: int = 0) -> None:
    """Schedule one more token while ``in_flight`` computed ones have not settled."""
    one.num_in_flight_tokens = in_flight
    one.append_output_token_ids(7)
    assert manager.allocate_slots(one, 1) is not None
    one.num_computed_tokens += 1


def live(manager: KVCacheManager, one: Request, group: int = 0) -> list[int]:
    table = manager.coordinator.single_type_managers[group].req_to_blocks[one.request_id]
    return [column for column, block in enumerate(table) if not block.is_null]


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_are_freed_when_the_step_that_ends_the_prompt_has_settled(caching: bool) -> None:
    layouts = [TokenLayout(BLOCK, Fraction(1, 4)), TokenLayout(BLOCK, Fraction(3, 4))]
    manager = make(layouts, caching)
    before = free(manager)
    one = request("a", list(range(330)))
    start(manager, one)
    full = free(manager)
    decode(manager, one, in_flight=330)  # the next step is scheduled over the one in flight
    assert free(manager) == full and len(live(manager, one)) == 21
    decode(manager, one, in_flight=1)
    assert live(manager, one, 0) == live_columns(layouts[0], 330, 330, 21)
    assert live(manager, one, 1) == live_columns(layouts[1], 330, 330, 21)
    counted = [m.freed_blocks for m in manager.coordinator.single_type_managers]
    assert counted == [layout.gap(330) for layout in layouts]
    assert free(manager) == full + sum(counted)
    manager.free(one)
    assert free(manager) == before


def test_windows_are_freed_once_each() -> None:
    layout = TokenLayout(BLOCK, Fraction(1, 2), window=32)
    manager = make([layout])
    one = request("a", list(range(40)))
    start(manager, one)
    for _ in range(100):
        decode(manager, one)
        settled = one.num_computed_tokens - 1
        columns = -(-one.num_computed_tokens // BLOCK)
        assert live(manager, one) == live_columns(layout, 40, settled, columns)
    assert manager.coordinator.single_type_managers[0].freed_blocks == 1 + 2


def test_hits_end_before_the_first_block_that_is_overwritten() -> None:
    """The second group is asked with the length that the first one left, not with the prompt's."""
    layouts = [
        TokenLayout(BLOCK, Fraction(1, 4), 0, 1, 512),
        TokenLayout(BLOCK, Fraction(3, 4), 0, 1, 512),
    ]
    manager = make(layouts)
    prompt = list(range(600))
    first, second = request("a", prompt), request("b", prompt)
    assert start(manager, first) == 0
    assert 0 < start(manager, second) <= min(layout.hit_limit(600) for layout in layouts)


def test_shared_blocks_do_not_count_as_freed_until_the_last_one_lets_go() -> None:
    layout = TokenLayout(BLOCK, Fraction(1, 4))
    manager = make([layout])
    one, two = request("a", list(range(330))), request("b", list(range(330)))
    start(manager, one)
    shared = start(manager, two) // BLOCK
    assert shared == layout.gap(330)
    counter = manager.coordinator.single_type_managers[0]
    before = free(manager)
    decode(manager, one)
    assert counter.freed_blocks == 0 and free(manager) == before
    decode(manager, two)
    assert counter.freed_blocks == shared and free(manager) == before + shared


def test_nothing_that_is_overwritten_is_hashed() -> None:
    layout = TokenLayout(BLOCK, Fraction(1, 4), window=32)
    manager = make([layout])
    one = request("a", list(range(200)))
    start(manager, one)
    for _ in range(80):
        decode(manager, one)
    table = manager.coordinator.single_type_managers[0].req_to_blocks["a"]
    assert not any(block.block_hash for block in table)
    # What it gave back is: the next request with this prompt hits it.
    assert start(manager, request("b", list(range(200)))) == layout.hit_limit(200)


def test_a_resumed_request_starts_from_the_beginning() -> None:
    manager = make([TokenLayout(BLOCK, Fraction(1, 4))])
    one = request("a", list(range(330)))
    start(manager, one)
    for _ in range(200):
        decode(manager, one)
    manager.free(one)  # as a preemption does
    one.num_computed_tokens = 0
    assert manager.get_computed_blocks(one)[1] == 0
    assert start(manager, request("b", list(range(330)))) > 0  # others still hit


def test_a_request_that_opted_out_frees_nothing_and_is_hashed_whole() -> None:
    manager = make([TokenLayout(BLOCK, Fraction(1, 4))])
    one = request("a", list(range(330)), compress_keep=1)
    start(manager, one)
    for _ in range(3):
        decode(manager, one)
    assert live(manager, one) == list(range(21))
    table = manager.coordinator.single_type_managers[0].req_to_blocks["a"]
    assert all(block.block_hash for block in table[:20])


def test_a_request_that_asked_for_less_frees_more() -> None:
    layout = TokenLayout(BLOCK, Fraction(1, 2))
    manager = make([layout])
    one, other = (request(name, list(range(330)), **extra) for name, extra in ASKED.items())
    for each in (one, other):
        start(manager, each)
        for _ in range(3):
            decode(manager, each)
    own = layout.asked(Fraction(1, 4))
    for each, theirs in ((one, layout), (other, own)):
        assert live(manager, each) == live_columns(theirs, 330, 332, 21)
        table = manager.coordinator.single_type_managers[0].req_to_blocks[each.request_id]
        hashed = theirs.first_destination(330)
        blocks = [block for block in table if not block.is_null]
        assert hashed is not None and not any(block.block_hash for block in blocks)


ASKED: dict[str, dict[str, object]] = {"a": {}, "b": {"compress_keep": "0.25"}}


def test_a_budget_of_its_own_is_never_begun_from_a_hit() -> None:
    layout = BoundedLayout(BLOCK, 20 * BLOCK, 4 * BLOCK)
    manager = make([layout])
    first = request("a", list(range(150)))
    assert start(manager, first) == 0
    one = request("b", list(range(150)), compress_budget=8 * BLOCK)
    with pytest.raises(RuntimeError, match="request b asks for a budget of its own and may have"):
        start(manager, one)
    one = request("c", list(range(150)), compress_budget=8 * BLOCK)
    one.skip_reading_prefix_cache = True  # as the check of requests sees to it
    assert start(manager, one) == 0
    for _ in range(3):
        decode(manager, one)
    columns = live_columns(layout.asked(8 * BLOCK), 150, 152, 10)
    assert live(manager, one) == columns and len(columns) < 10
    assert start(manager, request("d", list(range(150)))) > 0


def test_a_prompt_may_be_larger_than_the_pool() -> None:
    """With a prompt window: it is admitted, and takes no more than was said."""
    layout = BoundedLayout(BLOCK, 64 * BLOCK, 16 * BLOCK, prompt_window=128 * BLOCK)
    manager = make([layout])
    group = manager.coordinator.single_type_managers[0]
    most = group.max_admission_blocks_per_request
    assert most is not None and most < BLOCKS < LONGEST // BLOCK
    before = free(manager)
    for name, length, hit in (("a", 3000, 0), ("b", 8000, 64 * BLOCK)):
        one = request(name, list(range(length)))
        blocks, tokens, _ = manager.get_computed_blocks(one)
        assert tokens == hit
        one.num_computed_tokens = tokens
        while one.num_computed_tokens < length:
            q = min(CHUNK, length - one.num_computed_tokens)
            first = one.num_computed_tokens == tokens
            added = (tokens, blocks) if first and tokens else (0, None)
            one.num_computed_tokens -= added[0]
            given = manager.allocate_slots(one, q, *added, full_sequence_must_fit=first)
            assert given is not None
            one.num_computed_tokens += added[0] + q
            assert len(live(manager, one)) <= most
        for _ in range(300):
            decode(manager, one)
            assert len(live(manager, one)) <= (64 + 16 + 1) + CHUNK // BLOCK
        manager.free(one)
        assert free(manager) == before
    whole = make([BoundedLayout(BLOCK, 64 * BLOCK, 16 * BLOCK)])
    one = request("c", list(range(8000)))
    assert whole.allocate_slots(one, CHUNK, full_sequence_must_fit=True) is None


def test_a_prompt_that_grows_is_refused() -> None:
    manager = make([TokenLayout(BLOCK, Fraction(1, 4))])
    one = request("a", list(range(40)))
    one.resumable = True
    with pytest.raises(RuntimeError, match="streams its prompt in"):
        start(manager, one)


def test_a_prompt_that_grows_is_refused_without_prefix_caching() -> None:
    manager = make([TokenLayout(BLOCK, Fraction(1, 4))], caching=False)
    one = request("a", list(range(330)))
    start(manager, one)
    decode(manager, one)
    one.num_prompt_tokens += 40
    with pytest.raises(RuntimeError, match="streams its prompt in"):
        decode(manager, one)


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_no_block_is_lost(random: Random) -> None:
    layouts = [TokenLayout(BLOCK, Fraction(1, 4), 32), TokenLayout(BLOCK, Fraction(1, 2), 32)]
    manager = make(layouts)
    total = free(manager)
    running: dict[str, Request] = {}
    for step in range(120):
        if len(running) < 3 and random.random() < 0.3:
            prompt = [random.randrange(2)] * 48 + list(range(random.randrange(1, 90)))
            running[f"{step}"] = one = request(f"{step}", prompt)
            start(manager, one)
        for name, one in list(running.items()):
            if random.random() < 0.05:
                manager.free(running.pop(name))  # finished, aborted or preempted
            else:
                decode(manager, one)
        held = set()
        for group, layout in enumerate(layouts):
            table = manager.coordinator.single_type_managers[group].req_to_blocks
            for one in running.values():
                held |= {block.block_id for block in table[one.request_id] if not block.is_null}
                settled = one.num_computed_tokens - 1
                columns = -(-one.num_computed_tokens // BLOCK)
                if settled >= one.num_prompt_tokens:
                    want = live_columns(layout, one.num_prompt_tokens, settled, columns)
                    assert live(manager, one, group) == want
        assert free(manager) + len(held) == total
    for one in running.values():
        manager.free(one)
    assert free(manager) == total
