# SPDX-License-Identifier: Apache-2.0
"""Prefix hits of windows and states beside compressed layers, with vLLM's own scheduler."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

import vllm_plugin
from benchmarks.architectures import write_config
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.tokens import TokenLayout
from tests.support.scheduling import SHAPE, Serving
from vllm_plugin.kv_cache import windows
from vllm_plugin.kv_cache.beside import load_of
from vllm_plugin.kv_cache.hits import hit_end
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.states import StateConnector
from vllm_plugin.kv_cache.windows import WindowSpec
from vllm_plugin.metrics.connector import StatsConnector

KINDS = ("windows", "states")
FAMILIES = {"windows": "gpt-oss", "states": "qwen3.5"}
POOL = 400
BUDGETS = st.sampled_from([96, 160, 4096])  # tokens of a step
Make = Callable[..., Serving]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VllmConfig]:
    """Of an engine of each kind with a policy, of one without, and of one without metrics."""
    root = tmp_path_factory.mktemp("configs")
    vllm_plugin.register()
    made = {}
    for kind, family in FAMILIES.items():
        folder = write_config(family, root / kind)
        for name in ("ours", "stock", "quiet"):
            kv = {"kv": {"policy": "key_diff", "keep": 0.25}, "metrics": name == "ours"}
            made[f"{kind} {name}"] = configure(folder, {} if name == "stock" else {"compress": kv})
    return made


def configure(folder: Path, additional: dict[str, Any]) -> VllmConfig:
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        enable_prefix_caching=True,
        async_scheduling=False,
        additional_config=additional,
    ).create_engine_config()


def quarter(block: int) -> TokenLayout:
    return TokenLayout(block, Fraction(1, 4), 0, 1, block)


@pytest.fixture(scope="module")
def make(configs: dict[str, VllmConfig]) -> Make:
    def make(
        kind: str,
        budget: int = 4096,
        blocks: int = POOL,
        engine: str = "ours",
        layouts: Callable[[int], list[Any]] = lambda block: [quarter(block)],
    ) -> Serving:
        config = configs[f"{kind} {engine}"]
        block = config.cache_config.block_size
        full = FullAttentionSpec(block_size=block, **SHAPE)
        every = tuple(layouts(block))
        specs: list[KVCacheSpec] = [CompressedSpec.of(full, layout) for layout in every]
        beside: KVCacheSpec
        if kind == "windows":
            beside = SlidingWindowSpec(block_size=block, sliding_window=2 * block - 3, **SHAPE)
            beside = beside if engine == "stock" else WindowSpec.of(beside, every, block)
        else:
            beside = MambaSpec(
                block_size=block,
                shapes=((8,),),
                dtypes=(torch.float32,),
                mamba_cache_mode=config.cache_config.mamba_cache_mode,
            )
        specs = [full] if engine == "stock" else specs
        return Serving(config, [*specs, beside], blocks, budget)

    return make


def block_of(serving: Serving) -> int:
    return serving.scheduler.block_size


def text(tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + tokens))


@pytest.mark.parametrize("kind", KINDS)
@given(length=st.floats(0.1, 9.9), more=st.floats(0, 4), budget=BUDGETS)
@settings(deadline=None, max_examples=30)
def test_a_repeated_prompt_hits_what_compressed_layers_hit(
    make: Make, kind: str, length: float, more: float, budget: int
) -> None:
    """Stock hits all of its blocks but the last token's."""
    ours, stock = make(kind, budget), make(kind, budget, engine="stock")
    block, before = block_of(ours), ours.free
    tokens = max(1, int(length * block))
    layout, prompt = quarter(block), text(tokens)
    assert ours.serve("a", prompt) == stock.serve("a", prompt) == 0
    limit = layout.hit_limit(tokens)
    assert ours.serve("b", prompt) == limit
    assert stock.serve("b", prompt) == (tokens - 1) // block * block
    longer = [*prompt, *text(int(more * block), 9000)]
    assert ours.serve("c", longer) == min(limit, layout.hit_limit(len(longer)))
    assert ours.free == before


@pytest.mark.parametrize("kind", KINDS)
@given(shared=st.integers(1, 6), tails=st.integers(1, 6), budget=BUDGETS)
@settings(deadline=None, max_examples=20)
def test_prompts_that_begin_alike_hit_there_and_where_they_are_repeated(
    make: Make, kind: str, shared: int, tails: int, budget: int
) -> None:
    """The second of them shows vLLM where they part. It keeps that place and ours."""
    ours = make(kind, budget)
    block, before = block_of(ours), ours.free
    system = text(shared * block)
    prompts = [[*system, *text(tails * block + 5, 1000 * at)] for at in range(1, 5)]
    limit = quarter(block).hit_limit(len(prompts[0]))
    common = min(limit, len(system))
    for at, prompt in enumerate(prompts):
        hit = ours.serve(f"first {at}", prompt)
        if at == 1 and limit > len(system):  # a window behind the limit can reach so far back
            assert hit in (0, common)
        else:
            assert hit == (common if at else 0)
    for at, prompt in enumerate(prompts):
        assert ours.serve(f"again {at}", prompt) == limit
    assert ours.free == before


def test_states_are_kept_in_a_prompt_that_is_cut_anyway(make: Make) -> None:
    """At the last block of the prompt, as stock does, and where a hit ends."""
    ours, stock = make("states"), make("states", engine="stock")
    block = block_of(ours)
    prompt = text(8 * block + 5)
    ours.serve("a", prompt)
    stock.serve("a", prompt)
    assert stock.cuts["a"] == [8 * block, 8 * block + 5]
    assert ours.cuts["a"] == [6 * block, 8 * block, 8 * block + 5]


def test_a_request_that_keeps_everything_is_cut_as_stock_cuts_it(make: Make) -> None:
    ours, stock = make("states"), make("states", engine="stock")
    prompt = text(8 * block_of(ours) + 5)
    ours.serve("a", prompt, compress_keep=1)
    stock.serve("a", prompt)
    assert ours.cuts == stock.cuts


@pytest.mark.parametrize("kind", KINDS)
def test_at_keep_1_everything_is_as_in_stock(make: Make, kind: str) -> None:
    ours = make(kind, 160, layouts=lambda block: [TokenLayout(block, Fraction(1))])
    stock = make(kind, 160, engine="stock")
    block = block_of(ours)
    for name, prompt in (
        ("a", text(8 * block + 5)),
        ("b", [*text(3 * block), *text(4 * block, 2000)]),
        ("c", [*text(3 * block), *text(5 * block, 3000)]),
        ("d", text(8 * block + 5)),
    ):
        assert ours.serve(name, prompt, 40) == stock.serve(name, prompt, 40)
    assert ours.cuts == stock.cuts


def test_a_step_that_fills_no_block_does_not_look_where_a_hit_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    def counted(layouts: Any, prompt: int) -> int:
        looked.append(prompt)
        return hit_end(layouts, prompt)

    monkeypatch.setattr(windows, "hit_end", counted)
    ours = make("windows")
    block = block_of(ours)
    ours.serve("a", text(8 * block + 5), 2 * block)
    assert len(looked) == 1 + 2  # the prompt's blocks, and two of the answer


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_keep_other_shares_hit_together(make: Make, kind: str) -> None:
    def layouts(block: int) -> list[Any]:
        return [TokenLayout(block, Fraction(part, 8), 0, 1, block) for part in (1, 2, 5)]

    ours = make(kind, layouts=layouts)
    block = block_of(ours)
    prompt = text(16 * block + 7)
    ours.serve("a", prompt)
    assert ours.serve("b", prompt) == hit_end(layouts(block), len(prompt)) == 6 * block


def test_memory_is_kept_for_each_prompt_that_a_step_can_cut(configs: dict[str, VllmConfig]) -> None:
    hybrid, mixed = configs["states ours"], configs["windows ours"]
    blocks = -(-hybrid.scheduler_config.max_num_batched_tokens // hybrid.cache_config.block_size)
    assert load_of(hybrid).prompts == min(blocks, hybrid.scheduler_config.max_num_seqs) > 1
    assert load_of(mixed).prompts == 1


def test_a_prompt_that_parts_beyond_its_hit_is_cut_at_the_hit(make: Make) -> None:
    """vLLM cuts it where two prompts part, where only the layers of the lowest level can hit."""

    def layouts(block: int) -> list[Any]:
        return [TokenLayout(block, Fraction(part, 8), 0, 1, block) for part in (1, 5)]

    ours = make("states", layouts=layouts)
    block = block_of(ours)
    prompt = [*text(10 * block), *text(6 * block + 7, 9000)]
    ours.serve("a", text(32 * block + 7))
    ours.serve("b", prompt)
    assert ours.serve("c", prompt) == hit_end(layouts(block), len(prompt)) == 6 * block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [3, 7, 20])
def test_a_budget_hits_what_its_layout_allows(make: Make, kind: str, blocks: int) -> None:
    """All of a prompt that stays whole; nothing of one whose first block is overwritten."""

    def layouts(block: int) -> list[Any]:
        return [BoundedLayout(block, 8 * block, 2 * block)]

    ours = make(kind, layouts=layouts)
    block = block_of(ours)
    prompt = text(blocks * block + 7)
    ours.serve("a", prompt, 3 * block)
    assert ours.serve("b", prompt) == hit_end(layouts(block), len(prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_hits_do_not_need_the_metrics(make: Make, kind: str) -> None:
    quiet = make(kind, engine="quiet")
    prompt = text(8 * block_of(quiet) + 5)
    quiet.serve("a", prompt)
    assert quiet.serve("b", prompt) == 6 * block_of(quiet)


def test_without_metrics_only_states_need_a_connector(configs: dict[str, VllmConfig]) -> None:
    assert configs["windows quiet"].kv_transfer_config is None
    for name, kind in (("states quiet", StateConnector), ("states ours", StatsConnector)):
        chosen = configs[name].kv_transfer_config
        assert KVConnectorFactory.get_connector_class(chosen) is kind
        assert KVConnectorFactory.supports_hma_config(chosen)
        assert not chosen.is_kv_consumer  # freed blocks would be held back


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), budget=BUDGETS)
@settings(deadline=None, max_examples=15)
def test_a_storm_of_aborts_and_preemptions_leaves_nothing(
    make: Make, kind: str, seed: int, budget: int
) -> None:
    """Prompts that begin alike, in a pool that is short."""
    draw = Random(seed)
    ours = make(kind, budget, blocks=36)
    block, before = block_of(ours), ours.free
    for number in range(12):
        system = text(draw.choice([0, 2, 5]) * block)
        tail = text(draw.randrange(1, 6 * block), 1000 * draw.randrange(1, 4))
        ours.add(str(number), [*system, *tail], draw.randrange(1, 2 * block))
    while ours.scheduler.has_unfinished_requests():
        ours.step()
        if draw.random() < 0.05 and ours.scheduler.requests:
            ours.abort(draw.choice(sorted(ours.scheduler.requests)))
    assert ours.free == before
    boundaries = ours.scheduler.connector._boundaries
    assert boundaries is not None and not boundaries._parting
    for manager in ours.scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not manager.req_to_blocks
