# SPDX-License-Identifier: Apache-2.0
"""What compaction takes beside the cache is what it says, whatever the policy."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_policies.compaction import ALL, Layer, Observations, compact, workspace
from kv_policies.latents import cache as cache_module
from kv_policies.latents import packing as packing_module
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import LatentView
from kv_policies.latents.rope import Rope
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from kv_policies.planner import Planner
from kv_policies.registry import build_policy, policies
from kv_policies.workspace import Heads, Transient, Workspace
from tests.kv_policies.latents.test_rope import table as rope_table
from tests.support.memory import peak_bytes

BLOCK, HEADS = 32, Heads(kv=4, group=2, size=64, itemsize=2, device="cpu")
FEATURES = HEADS.kv * HEADS.size
MIB = 1 << 20
CHOOSING = sorted(n for n, kind in policies().items() if kind.capabilities.content == "tokens")


class Pages:
    """K and V of one layer, side by side in a block."""

    def __init__(self, blocks: int, dtype: torch.dtype) -> None:
        self.cache = torch.randn(blocks, 2 * FEATURES * BLOCK).to(dtype)
        self._sides = self.cache.view(blocks, 2, HEADS.kv, BLOCK, HEADS.size).unbind(1)

    def _read(self, side: int, blocks: torch.Tensor, heads: slice) -> torch.Tensor:
        each = torch.arange(HEADS.kv)[heads]
        found = self._sides[side][blocks[:, None], each[:, None]]
        return found.flatten(2, 3)

    def keys(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self._read(0, blocks, heads)

    def values(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self._read(1, blocks, heads)

    def write_keys(self, blocks: torch.Tensor, keys: torch.Tensor, heads: slice = ALL) -> None:
        self._sides[0][blocks, heads] = keys

    def write_values(self, blocks: torch.Tensor, values: torch.Tensor, heads: slice = ALL) -> None:
        self._sides[1][blocks, heads] = values

    def key_numbers(self, keys: torch.Tensor) -> torch.Tensor:
        return keys

    def value_numbers(self, values: torch.Tensor) -> torch.Tensor:
        return values


def prompts(lengths: list[int], chunk: int = 0) -> tuple[Step, torch.Tensor]:
    """A step in which they all end, the last ``chunk`` tokens of each being new; 0: all."""
    n = np.array(lengths)
    q = np.minimum(n, chunk or n)
    step = Step(n, n - q, q, q.cumsum() - q, [str(at) for at in range(len(n))])
    columns = -(-int(n.max()) // BLOCK)
    return step, torch.arange(len(n) * columns).view(len(n), columns)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize(
    ("dtype", "lengths", "keep"),
    [
        (torch.bfloat16, [2500], Fraction(9, 10)),
        (torch.float16, [2500], Fraction(9, 10)),
        (torch.bfloat16, [1500, 400, 900, 1000], Fraction(9, 10)),
        (torch.float32, [2500], Fraction(39, 40)),
    ],
)
def test_a_policy_takes_no_more_than_it_states(
    name: str, dtype: torch.dtype, lengths: list[int], keep: Fraction
) -> None:
    """Whatever is kept. The limit is small, so that work has to be cut to fit."""
    policy = build_policy(name, {"queries": 300, "pool": 7} if name == "prefix_kv" else {})
    heads = HEADS._replace(itemsize=dtype.itemsize)
    stated = workspace(policy, heads)
    limit = stated.bytes(1, 1, 1) + MIB // 2
    space, layout = replace(stated, limit=limit), TokenLayout(BLOCK, keep)
    step, table = prompts(lengths)
    pages = Pages(table.numel(), dtype)
    layer = Layer("layer", 0, pages, heads, policy, space, Observations())
    query = torch.randn(int(step.q.sum()), HEADS.kv * HEADS.group, HEADS.size).to(dtype)
    work = Planner([layout], policy, space).work(layout, step, table)
    assert work is not None
    assert len(work.prompts) > 1 or len(lengths) == 1
    peak = peak_bytes(lambda: compact(work, layer, query))
    assert 0 < peak <= space.peak(max(lengths))
    # What is stated is worth stating: without cuts a step takes more.
    uncut = replace(stated, limit=1 << 40)
    work = Planner([layout], policy, uncut).work(layout, step, table)
    assert work is not None
    whole = peak_bytes(lambda: compact(work, replace(layer, space=uncut), query))
    assert whole > peak
    rows, most = len(lengths), -(-max(lengths) // BLOCK) * BLOCK
    assert whole <= stated.bytes(rows, most, HEADS.kv)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_take_no_more_than_they_state(
    monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype
) -> None:
    limit = 8 * MIB
    for module in (cache_module, packing_module):
        monkeypatch.setattr(module, "LIMIT", limit)
    ranks, lengths = (40, 50), [3000, 100, 2500, 700]
    itemsize = torch.finfo(dtype).bits // 8
    elements = 2 * FEATURES * BLOCK
    tokens = LatentFormat.most_tokens(elements, *ranks, bits)
    form = LatentFormat(*ranks, bits, tokens)  # type: ignore[arg-type]
    layout = LatentLayout(BLOCK, tokens, BLOCK, recent=BLOCK)
    step, table = prompts(lengths)
    pages = Pages(table.numel(), dtype)
    factors = [
        Factor(torch.randn(FEATURES, r), torch.randn(r, FEATURES), torch.zeros(FEATURES))
        for r in ranks
    ]
    cache = LatentCache(pages.cache, form, *factors, Rope(rope_table(4000, HEADS.size)))
    queries = HEADS.kv * HEADS.group
    stated = LatentCache.peak(form, FEATURES, HEADS.size, max(lengths), queries)
    packings = Packer([(layout, form)]).work(layout, step, table)
    assert packings is not None and (bits == 4 or len(packings.parts) > 1)
    assert 0 < peak_bytes(lambda: cache.pack(packings.parts, pages)) <= stated
    raw = sum(lengths) * 2 * FEATURES * itemsize
    assert stated < 2 * limit + raw  # of several times that

    n = np.array(lengths)
    step = Step(n, n, 0 * n + 1, np.arange(len(n)), step.ids)
    table = torch.cat((table, torch.zeros(len(n), 1, dtype=torch.int64)), 1)
    view, _ = LiveView(layout).update(step, table, torch.from_numpy(step.end))
    reading = LatentView(layout).update(step, table, view)
    assert reading is not None
    query = torch.randn(len(n), queries, HEADS.size).to(dtype)
    output = torch.empty_like(query)
    reading.contents.hidden, reading.contents.positions  # noqa: B018  # made once for all layers
    peak = peak_bytes(lambda: cache.attend(reading, pages, query, 1.0, output))
    assert 0 < peak <= stated

    # A resumed request comes with many queries.
    n, q = n[:1], 0 * n[:1] + 64
    step = Step(n, n, q, 0 * q, step.ids[:1])
    table = torch.cat((table[:1], torch.zeros(1, 4, dtype=torch.int64)), 1)
    view, _ = LiveView(layout).update(step, table, torch.from_numpy(step.end))
    reading = LatentView(layout).update(step, table, view)
    assert reading is not None
    query = torch.randn(64, queries, HEADS.size).to(dtype)
    output = torch.empty_like(query)
    peak = peak_bytes(lambda: cache.attend(reading, pages, query, 1.0, output))
    assert 0 < peak <= stated
    whole = peak_bytes(lambda: cache._attend(reading, pages, query, 1.0, output))
    assert whole > stated  # if it was not cut


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=9),
    st.integers(1, 8),
    st.integers(0, 20_000),
    st.booleans(),
)
def test_parts_cover_the_work_and_fit(
    lengths: list[int], heads: int, limit: int, together: bool
) -> None:
    space = Workspace(Transient(7, 11, 100), heads if together else 1, limit)
    rows = space.rows(lengths)
    assert [at for part in rows for at in range(len(lengths))[part]] == list(range(len(lengths)))
    for part in rows:
        count, longest = part.stop - part.start, max(lengths[part])
        slices = space.heads(count, longest, heads)
        assert [at for part in slices for at in range(heads)[part]] == list(range(heads))
        most = max(part.stop - part.start for part in slices)
        assert space.bytes(count, longest, most) <= space.peak(max(lengths))
