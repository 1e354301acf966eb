# SPDX-License-Identifier: Apache-2.0
"""The pieces together, as an engine joins them: paged cache, scores, choice, packing, view."""

from dataclasses import replace
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.base import Capabilities, Context, KVPolicy, QueryFreePolicy
from kv_policies.compaction import ALL, Layer, Observations, compact, observed_bytes, workspace
from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from kv_policies.planner import Planner
from kv_policies.recent_queries import RecentQueries
from kv_policies.registry import build_policy, policies
from kv_policies.window_policy import describe_windows, window_policy, window_queries
from kv_policies.workspace import LIMIT, Heads

BLOCK, HEADS, KV_HEADS, DIM, WIDTH, END = 4, 4, 2, 8, 16, 60
LENGTHS = (43, 20, 9)  # prompts: N % BLOCK is 3, 0 and 1
IDS = ["a", "b", "c"]
CHOOSING = sorted(n for n, kind in policies().items() if kind.capabilities.content == "tokens")


SHAPE = Heads(KV_HEADS, HEADS // KV_HEADS, DIM, 4, "cpu")


class DensePages:
    """Blocks as they are: [blocks, Hkv, BLOCK, DIM]."""

    def __init__(self, blocks: int) -> None:
        self.k = torch.zeros(blocks, KV_HEADS, BLOCK, DIM)
        self.v = torch.zeros(blocks, KV_HEADS, BLOCK, DIM)

    def keys(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self.k[blocks, heads].transpose(1, 2).flatten(2, 3)

    def values(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self.v[blocks, heads].transpose(1, 2).flatten(2, 3)

    def write_keys(self, blocks: torch.Tensor, keys: torch.Tensor, heads: slice = ALL) -> None:
        self.k[blocks, heads] = keys

    def write_values(self, blocks: torch.Tensor, values: torch.Tensor, heads: slice = ALL) -> None:
        self.v[blocks, heads] = values

    def key_numbers(self, keys: torch.Tensor) -> torch.Tensor:
        return keys

    def value_numbers(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Engine:
    """One layer and three requests, tokens of known K and V."""

    sinks: torch.Tensor | None = None
    softcap: float | None = None

    def __init__(self, name: str | KVPolicy, layout: Layout, limit: int = LIMIT) -> None:
        torch.manual_seed(0)
        policy = name
        if isinstance(policy, str):
            values = {"snap_kv": {"window": 4}, "prefix_kv": {"queries": 9}}.get(policy, {})
            policy = build_policy(policy, values)
        self.layout = layout
        self.table = torch.randperm(3 * WIDTH).view(3, WIDTH).int()
        self.pages = DensePages(3 * WIDTH)
        self.raw_k = torch.randn(3, END, KV_HEADS, DIM)
        self.raw_v = self.raw_k + 100
        self.queries = torch.randn(3, END, HEADS, DIM)
        self.c = np.zeros(3, np.int64)
        self.n = np.array(LENGTHS)
        self.observations = Observations()
        space = replace(workspace(policy, SHAPE), limit=limit)
        self.layer = Layer(
            "layer", 7, self.pages, SHAPE, policy, space, self.observations, DIM**-0.5
        )
        self.recent: RecentQueries | None = None
        if count := window_queries(policy, layout):
            self.recent = RecentQueries(count, 3, 2, HEADS, DIM, torch.float32, torch.device("cpu"))
            first = self.recent.places  # as of the second of two layers
            self.layer = replace(self.layer, recent=self.recent.stored, first_recent=first)

    def step(self, q: list[int]) -> None:
        count = np.array(q)
        starts = count.cumsum() - count
        for row, (at, new) in enumerate(zip(self.c.tolist(), q, strict=True)):
            for position in range(at, at + new):
                block, offset = self.table[row, position // BLOCK], position % BLOCK
                self.pages.k[block, :, offset] = self.raw_k[row, position]
                self.pages.v[block, :, offset] = self.raw_v[row, position]
        spans = enumerate(zip(self.c.tolist(), q, strict=True))
        query = torch.cat([self.queries[row, at : at + new] for row, (at, new) in spans])
        step = Step(self.n, self.c, count, starts, IDS)
        planner = Planner([self.layout], self.layer.policy, self.layer.space, self.recent)
        for _, passed in step.passes(self.layout):
            if self.recent is not None:
                storing = self.recent.storing(passed, torch.from_numpy(passed.end))
                if storing is not None:
                    places = storing.places + self.layer.first_recent
                    self.recent.stored[places] = query[storing.tokens]
            table = self.table[[IDS.index(name) for name in passed.ids]]
            if (work := planner.work(self.layout, passed, table)) is not None:
                layer = replace(self.layer, sinks=self.sinks, softcap=self.softcap)
                compact(work, layer, query)
        self.c = self.c + count

    def preempt(self, row: int) -> None:
        """Let a request start again, elsewhere."""
        self.observations.forget(IDS[row])
        if self.recent is not None:
            self.recent.forget(IDS[row])
        self.c[row] = 0
        self.pages.k[self.table[row].long()] = torch.nan

    def contents(self, row: int, head: int) -> list[int]:
        """Positions of what attention reads, each found by its key; values must belong to keys."""
        step = Step(self.n, self.c, 0 * self.c, 0 * self.c, IDS)
        view, seq_lens = LiveView(self.layout).update(step, self.table, torch.from_numpy(self.c))
        blocks, count = view[row].long(), int(seq_lens[row])
        keys = self.pages.k[blocks, head].flatten(0, 1)[:count]
        values = self.pages.v[blocks, head].flatten(0, 1)[:count]
        assert torch.equal(values, keys + 100)
        same = (keys[:, None] == self.raw_k[row, None, :, head]).all(-1)
        assert bool((same.sum(1) == 1).all())
        return same.int().argmax(1).tolist()


@pytest.mark.parametrize("keep", [Fraction(1, 4), Fraction(1, 2), Fraction(1)])
@pytest.mark.parametrize("name", CHOOSING)
def test_compacted_cache_holds_the_chosen_tokens_in_order(name: str, keep: Fraction) -> None:
    layout = TokenLayout(BLOCK, keep)
    engine = Engine(name, layout)
    engine.step(list(LENGTHS))
    for row, length in enumerate(LENGTHS):
        full = length // BLOCK * BLOCK
        kept = layout.kept(length // BLOCK) * BLOCK
        for head in range(KV_HEADS):
            positions = engine.contents(row, head)
            assert positions == sorted(positions) and positions[0] == 0
            assert positions[kept:] == list(range(full, length))  # the raw tail
            assert keep < 1 or positions == list(range(length))
        # Freed columns were only read: they stay valid for the prefix cache.
        for first, stop in layout.freed(length, length):
            for column in range(first, stop):
                raw = engine.raw_k[row, column * BLOCK : (column + 1) * BLOCK].transpose(0, 1)
                assert torch.equal(engine.pages.k[int(engine.table[row, column])], raw)


@given(
    st.sampled_from(CHOOSING),
    st.sampled_from([Fraction(1, 4), Fraction(1, 2)]),
    st.sampled_from([0, 8]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=20)
def test_cuts_into_chunks_and_batches_do_not_matter(
    name: str, keep: Fraction, window: int, random: Random
) -> None:
    layout = TokenLayout(BLOCK, keep, window=window)
    whole = Engine(name, layout)
    whole.step(list(LENGTHS))
    cut = Engine(name, layout, limit=random.choice([0, 1 << 17, LIMIT]))
    while (cut.c < cut.n).any():
        left = (cut.n - cut.c).tolist()
        cut.step([random.randint(min(1, most), most) for most in left])
    assert len(cut.observations) == 0  # nothing is remembered of a complete prompt
    for engine in (whole, cut):
        while int(engine.c.max()) < END:
            engine.step([1, 1, 1])
    for row in range(3):
        for head in range(KV_HEADS):
            assert whole.contents(row, head) == cut.contents(row, head)


@given(
    st.sampled_from(CHOOSING),
    st.sampled_from([TokenLayout(BLOCK, Fraction(1, 2), window=8), BoundedLayout(BLOCK, 24, 8)]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=30)
def test_a_resumed_request_keeps_what_it_would_have_kept(
    name: str, layout: Layout, random: Random
) -> None:
    """Its prompt and its generated tokens are one prefill then, cut anywhere."""
    straight, resumed = Engine(name, layout), Engine(name, layout)
    for engine in (straight, resumed):
        engine.step(list(LENGTHS))
        while int(engine.c.max()) < 56:
            engine.step([1, 1, 1])
    row = random.randrange(3)
    stop = int(resumed.c[row])
    resumed.preempt(row)
    while resumed.c[row] < stop:
        q = [0, 0, 0]
        q[row] = random.randint(1, stop - int(resumed.c[row]))
        resumed.step(q)
    for engine in (straight, resumed):
        while int(engine.c.max()) < END:
            engine.step([1, 1, 1])
    for other in range(3):
        for head in range(KV_HEADS):
            assert straight.contents(other, head) == resumed.contents(other, head)


def test_windows_are_scored_without_queries() -> None:
    for name in CHOOSING:
        policy = build_policy(name, {})
        if policy.capabilities.needs_queries:
            policy = build_policy(name, {"decode_queries": 0})
        assert not window_policy(policy).capabilities.needs_queries


def test_the_log_says_what_scores_windows() -> None:
    def said(name: str, window: int = 256) -> str:
        return describe_windows(build_policy(name, {}), window)

    because = ", because snap_kv needs queries and decode_queries is 0"
    assert said("snap_kv") == "decode windows of 256 scored by key_diff" + because
    assert said("h2o") == "decode windows of 256 scored by h2o, from 32 queries each"
    assert said("recent") == "decode windows of 256 scored by recent"
    assert said("cskv", 32) == "decode windows of 32"
    assert said("snap_kv", 0) == "generated tokens are kept"


def test_lost_observations_are_an_error() -> None:
    engine = Engine("snap_kv", TokenLayout(BLOCK, Fraction(1, 4)))
    engine.step([42, 20, 9])
    engine.observations.forget("a")
    with pytest.raises(RuntimeError, match="request a: earlier chunks"):
        engine.step([1, 1, 1])


class LargestValue(QueryFreePolicy):
    """A policy of somebody else's, that looks at values and at the layer."""

    name = "largest_value"
    capabilities = Capabilities(
        needs=frozenset({"values"}), per_head=False, needs_profile=False, paper="https://"
    )

    def score(self, context: Context) -> torch.Tensor:
        assert context.layer == 7 and context.values is not None
        assert context.keys is None and context.observed is None  # not asked for
        assert context.values.shape[1:] == (KV_HEADS, context.tokens, DIM)
        return context.values.abs().sum(-1).amax(1, keepdim=True)


class MostAttended(QueryFreePolicy):
    """A policy of somebody else's, that asks for what it observed and nothing else."""

    name = "most_attended"
    capabilities = Capabilities(frozenset({"queries"}), False, False, paper="https://")

    def first_query(self, stop: int) -> int:
        return 0

    def observe(
        self, queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return torch.ones(keys.shape[:3])

    def score(self, context: Context) -> torch.Tensor:
        assert context.observed is not None
        assert context.keys is None and context.values is None  # not asked for
        return context.observed


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_a_policy_is_given_no_keys_that_it_did_not_ask_for(limit: int) -> None:
    """However the work is cut: its queries were observed against keys."""
    policy = MostAttended(MostAttended.settings_type())
    Engine(policy, TokenLayout(BLOCK, Fraction(1, 2)), limit).step(list(LENGTHS))


class FavoredHeads(MostAttended):
    """Of heads with a larger sink, keys count for more."""

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sinks is not None and len(sinks) == queries.shape[1]
        at = torch.arange(keys.shape[2]).expand(keys.shape[:3])
        return at * sinks.view(keys.shape[1], -1).sum(1)[:, None]


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_queries_are_observed_with_the_sinks_of_their_heads(limit: int) -> None:
    """However few heads are worked on at a time: the first head's sinks outweigh the others'."""
    layout = TokenLayout(BLOCK, Fraction(1, 2))
    engine = Engine(FavoredHeads(FavoredHeads.settings_type()), layout, limit)
    engine.sinks = torch.tensor([-4.0, -3.0, 1.0, 2.0])
    engine.step(list(LENGTHS))
    kept = engine.contents(0, 0)  # in all heads those of the first half, and the last token
    assert kept == [*range(19), 39, *range(40, 43)]


class Capped(MostAttended):
    """Keeps the first half where logits are capped at 2, the second elsewhere."""

    capabilities = replace(MostAttended.capabilities, caps_logits=True)

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        at = torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()
        return -at if softcap == 2 else at


@pytest.mark.parametrize(
    ("kind", "softcap", "kept"),
    [
        (Capped, 2.0, [*range(19), 39]),
        (Capped, None, [0, *range(21, 40)]),
        (MostAttended, 2.0, [*range(19), 39]),  # does not say that it caps logits: is given none
    ],
)
def test_queries_are_observed_with_the_cap_of_their_logits(
    kind: type, softcap: float | None, kept: list[int]
) -> None:
    engine = Engine(kind(kind.settings_type()), TokenLayout(BLOCK, Fraction(1, 2)))
    engine.softcap = softcap
    engine.step(list(LENGTHS))
    assert engine.contents(0, 0) == [*kept, *range(40, 43)]


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_a_policy_may_score_by_values_of_all_heads(limit: int) -> None:
    layout = TokenLayout(BLOCK, Fraction(1, 2))
    engine = Engine(LargestValue(LargestValue.settings_type()), layout, limit)
    engine.step(list(LENGTHS))
    full = 40  # of the 43 tokens of the first prompt
    size = engine.raw_v[0, :full].abs().sum(-1).amax(1)
    size[0] = size[full - 1] = torch.inf
    best = sorted(size.sort(descending=True, stable=True).indices[:20].tolist())
    for head in range(KV_HEADS):
        assert engine.contents(0, head) == [*best, *range(full, 43)]


@pytest.mark.parametrize("name", CHOOSING)
def test_observations_take_what_is_stated(name: str) -> None:
    """Of a prompt that lacks only the last token, which is in a block that is begun."""
    engine = Engine(name, TokenLayout(BLOCK, Fraction(1, 2)))
    engine.step([LENGTHS[0] - 1, 0, 0])
    stated = observed_bytes(engine.layer.policy, SHAPE, -(-LENGTHS[0] // BLOCK) * BLOCK)
    kept = [seen for layers in engine.observations._sums.values() for seen in layers.values()]
    assert sum(seen.untyped_storage().nbytes() for seen in kept) == stated
    assert bool(stated) is engine.layer.policy.capabilities.needs_queries
