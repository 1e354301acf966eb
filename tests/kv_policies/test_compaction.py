# SPDX-License-Identifier: Apache-2.0
"""The pieces together, as an engine joins them: paged cache, scores, choice, packing, view."""

from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.compaction import Observations, compact, plan_step, window_policy
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.registry import build_policy, policies

BLOCK, HEADS, KV_HEADS, DIM, WIDTH, END = 4, 4, 2, 8, 16, 60
LENGTHS = (43, 20, 9)  # prompts: N % BLOCK is 3, 0 and 1
IDS = ["a", "b", "c"]
CHOOSING = sorted(n for n, kind in policies().items() if kind.capabilities.content == "tokens")


class DensePages:
    """Blocks as they are: [blocks, Hkv, BLOCK, DIM]."""

    def __init__(self, blocks: int) -> None:
        self.k = torch.zeros(blocks, KV_HEADS, BLOCK, DIM)
        self.v = torch.zeros(blocks, KV_HEADS, BLOCK, DIM)

    def read(self, blocks: torch.Tensor) -> "DenseContent":
        return DenseContent(self.k[blocks], self.v[blocks])

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.k[blocks], self.v[blocks] = keys, values


class DenseContent:
    def __init__(self, *blocks: torch.Tensor) -> None:
        self.k, self.v = (content.transpose(1, 2).flatten(2, 3) for content in blocks)

    def keys(self) -> torch.Tensor:
        return self.k

    def values(self) -> torch.Tensor:
        return self.v


class Engine:
    """One layer and three requests, tokens of known K and V."""

    def __init__(self, name: str, layout: TokenLayout) -> None:
        torch.manual_seed(0)
        values = {"snap_kv": {"window": 4}, "prefix_kv": {"queries": 9}}.get(name, {})
        self.layout, self.policy = layout, build_policy(name, values)
        self.table = torch.randperm(3 * WIDTH).view(3, WIDTH).int()
        self.pages = DensePages(3 * WIDTH)
        self.raw_k = torch.randn(3, END, KV_HEADS, DIM)
        self.raw_v = self.raw_k + 100
        self.queries = torch.randn(3, END, HEADS, DIM)
        self.c = torch.zeros(3, dtype=torch.int64)
        self.n = torch.tensor(LENGTHS)
        self.observations = Observations()

    def step(self, q: list[int]) -> None:
        count = torch.tensor(q)
        starts = count.cumsum(0) - count
        for row, (at, new) in enumerate(zip(self.c.tolist(), q, strict=True)):
            for position in range(at, at + new):
                block, offset = self.table[row, position // BLOCK], position % BLOCK
                self.pages.k[block, :, offset] = self.raw_k[row, position]
                self.pages.v[block, :, offset] = self.raw_v[row, position]
        spans = enumerate(zip(self.c.tolist(), q, strict=True))
        query = torch.cat([self.queries[row, at : at + new] for row, (at, new) in spans])
        step = Step(self.n, self.c, count, starts, IDS, None)
        work = plan_step(self.layout, self.policy, self.table, step)
        if work is not None:
            compact(work, self.policy, "layer", self.pages, query, DIM**-0.5, self.observations)
        self.c += count

    def contents(self, row: int, head: int) -> list[int]:
        """Positions of what attention reads, each found by its key; values must belong to keys."""
        zero = torch.zeros_like(self.n)
        view, seq_lens = self.layout.view(self.table, self.n, self.c, zero)
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
    cut = Engine(name, layout)
    while bool((cut.c < cut.n).any()):
        left = (cut.n - cut.c).tolist()
        cut.step([random.randint(min(1, most), most) for most in left])
    assert len(cut.observations) == 0  # nothing is remembered of a complete prompt
    for engine in (whole, cut):
        while int(engine.c.max()) < END:
            engine.step([1, 1, 1])
    for row in range(3):
        for head in range(KV_HEADS):
            assert whole.contents(row, head) == cut.contents(row, head)


def test_windows_are_scored_without_queries() -> None:
    for name in CHOOSING:
        assert not window_policy(build_policy(name, {})).capabilities.needs_queries


def test_lost_observations_are_an_error() -> None:
    engine = Engine("snap_kv", TokenLayout(BLOCK, Fraction(1, 4)))
    engine.step([42, 20, 9])
    engine.observations.forget("a")
    with pytest.raises(RuntimeError, match="request a: earlier chunks"):
        engine.step([1, 1, 1])
