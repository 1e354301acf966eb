# SPDX-License-Identifier: Apache-2.0
"""Raw tokens and latents together are all tokens, each once, in blocks of the request's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from kv_policies.latents.plan import plan_packing, plan_reading
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step
from tests.support.layout_sim import Sim, live


@st.composite
def layouts(draw: st.DrawFn) -> tuple[LatentLayout, int]:
    """A layout, and the tokens of which latents are written at once."""
    block_size = draw(st.integers(2, 8))
    unit = block_size * draw(st.integers(1, 3))
    written = draw(st.sampled_from([size for size in range(1, unit + 1) if unit % size == 0]))
    tokens = -(-(block_size + draw(st.integers(1, 40))) // written) * written
    layout = LatentLayout(
        block_size,
        tokens,
        unit,
        window=unit * draw(st.integers(0, 3)),
        min_prompt=block_size * draw(st.integers(0, 6)),
        recent=block_size * draw(st.integers(0, 2)),
    )
    return layout, written


def test_picture_of_the_module_text() -> None:
    layout, n = LatentLayout(32, 160, 32, window=32, recent=32), 290
    assert layout.freed(n, n - 1) == []
    assert layout.freed(n, 319) == [(0, 6)]
    assert layout.freed(n, 383) == [(0, 6), (8, 9), (9, 10)]
    assert layout.freed(n, 384) == [(0, 6), (8, 9), (9, 10)]  # column 10 became the third block
    held = layout.latent_blocks(torch.tensor([n, n, n]), torch.tensor([290, 352, 384]))
    assert held.column.tolist() == [[6, 7, 6], [6, 7, 6], [6, 7, 10]]
    assert held.first.tolist() == [[0, 160, 0], [0, 160, 0], [0, 160, 320]]
    assert held.tokens.tolist() == [[160, 96, 0], [160, 160, 0], [160, 160, 32]]
    assert layout.cacheable(n, n) == 6 * 32


def test_short_prompts_stay_raw_and_what_is_generated_does_not() -> None:
    layout = LatentLayout(32, 160, 32, window=32, min_prompt=128, recent=32)
    assert layout.freed(100, 500) == [
        (first, first + 1) for first in [*range(5, 9), *range(10, 14)]
    ]
    held = layout.latent_blocks(torch.tensor([100]), torch.tensor([500]))
    assert held.column.tolist() == [[4, 9, 14][: held.column.shape[1]]]
    assert int(held.first[0, 0]) == 128 and int(held.tokens.sum()) == (500 - 32 - 128) // 32 * 32


def test_a_layout_of_no_latents_keeps_all_raw() -> None:
    layout = LatentLayout(32, 160, 32, window=32).opted_out()
    n, c = torch.tensor([290, 0]), torch.tensor([400, 0])
    columns, hidden = layout.moves(n, c, 13)
    assert columns.tolist() == [list(range(13))] * 2 and hidden.tolist() == [0, 0]
    assert layout.latent_blocks(n, c).tokens.sum() == 0 and not layout.window_ends(n, c, c)
    assert layout.gap(290) == 0 and layout.freed(290, 400) == []


def test_bad_arguments_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        LatentLayout(16, 8, 24, window=40, recent=-1)
    assert "5 problems" in str(caught.value)


class LatentSim(Sim[LatentLayout]):
    """Latents of a token are told from its raw content by name only."""

    written: int

    def _one(self, c: int, q: int) -> tuple[torch.Tensor, Step]:
        n, c_, q_ = (torch.tensor([x]) for x in (self.n, c, q))
        return torch.tensor([self.table]), Step(n, c_, q_, torch.tensor([0]), ["a"], None)

    def attend(self, c: int, q: int) -> None:
        table, step = self._one(c, q)
        columns, hidden = self.layout.moves(step.n, step.c, table.shape[1])
        view, seen = table.gather(1, columns), c + q - int(hidden)
        held = self.layout.latent_blocks(step.n, step.c)
        found: list[object] = []
        reading = plan_reading(self.layout, held, table, view, c + q - hidden, step)
        if reading is not None:
            rows = (x[0].tolist() for x in (reading.blocks, reading.first, reading.count))
            for block, first, count in zip(*rows, strict=True):
                assert self.blocks[block][:count] == [("latent", first + i) for i in range(count)]
                found += range(first, first + count)
            assert reading.longest == len(found)
        bs = self.layout.block_size
        raw = [token for block in view[0].tolist() for token in self.blocks[block][:bs]][:seen]
        assert all(kind == "raw" for kind, _ in raw)  # type: ignore[misc]
        found += [position for _, position in raw]  # type: ignore[misc]
        assert sorted(found) == list(range(c + q))  # type: ignore[type-var]
        # Nothing is held but what is read, and what the step's end will free.
        live = len(raw) // bs + (len(raw) % bs > 0) + (len(reading.blocks[0]) if reading else 0)
        freed = sum(stop - first for first, stop in self.layout.freed(self.n, c))
        assert live == -(-(c + q) // bs) - freed

    def compact(self, c: int, q: int) -> None:
        table, step = self._one(c, q)
        packing = plan_packing(self.layout, self.written, table, step)
        ending = self.layout.ending(self.n, c, q)
        if packing is None:
            assert not ending
            return
        (segment,) = ending
        fresh = {self.table[column] for column in range(*segment.destination)}
        assert set(packing.fresh.tolist()) == fresh and len(packing.fresh) == len(fresh)
        bs, size = self.layout.block_size, self.written
        source = [token for block in packing.blocks[0].tolist() for token in self.blocks[block]]
        first = int(packing.first)
        assert source == [("raw", first + i) for i in range((segment.stop - segment.start) * bs)]
        (tally,) = packing.tallies
        assert tally.tokens == len(source) and tally.kept == len(fresh) * bs
        for block in fresh:
            self.blocks[block] = ["nothing"] * self.layout.tokens
        rows = (packing.destination, packing.slot, packing.source)
        for block, slot, unit in zip(*(x.tolist() for x in rows), strict=True):
            assert block == self.own(self.table.index(block))
            place = slice(slot * size, (slot + 1) * size)
            assert self.blocks[block][place] == ["nothing"] * size
            self.blocks[block][place] = [
                ("latent", first + i) for i in range(unit * size, (unit + 1) * size)
            ]


@given(layouts(), st.integers(1, 70), st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=200)
def test_every_interleaving_reads_every_token_once(
    given_layout: tuple[LatentLayout, int], n: int, lag: int, data: st.DataObject
) -> None:
    sim = LatentSim(given_layout[0], n, lag)
    sim.written = given_layout[1]
    live(sim, data)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 250), st.integers(0, 130), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(layouts(), REQUESTS)
@settings(deadline=None, max_examples=300)
def test_batched_form_agrees_with_the_scalar_form(
    given_layout: tuple[LatentLayout, int], requests: list[tuple[int, int, int, bool]]
) -> None:
    layout, bs = given_layout[0], given_layout[0].block_size
    n, c, q, out = (torch.tensor(column) for column in zip(*requests, strict=True))
    width = -(-max(a + b for _, a, b, _ in requests) // bs) + 1
    columns, hidden = layout.moves(n, c, width, out)
    held = layout.latent_blocks(n, c, out)
    cut = ends = False
    for row, (n_, c_, q_, out_) in enumerate(requests):
        its = layout.opted_out() if out_ else layout
        segments = list(its.segments(n_, c_))
        covered = {at for segment in segments for at in range(segment.start, segment.stop)}
        raw = [column for column in range(-(-(c_ + q_) // bs)) if column not in covered]
        assert columns[row, : len(raw)].tolist() == raw
        assert int(hidden[row]) == len(covered) * bs
        of_row = zip(held.column[row].tolist(), held.tokens[row].tolist(), strict=True)
        latents = [column for column, tokens in of_row if tokens]
        assert latents == [at for segment in segments for at in range(*segment.destination)]
        cut |= len(its.substeps(n_, c_, q_)) > 1
        ends |= any(segment.ends > n_ for segment in its.ending(n_, c_, q_))
    assert layout.is_cut(n, c, q, out) == cut
    if ends:  # what a worker asks first must not miss a window
        assert layout.window_ends(n, c, q)


@given(layouts(), st.integers(1, 120), st.integers(1, 300))
@settings(deadline=None)
def test_the_full_blocks_of_a_prompt_tell_how_far_a_hit_may_reach(
    given_layout: tuple[LatentLayout, int], n: int, longest: int
) -> None:
    layout = given_layout[0]
    full = n // layout.block_size * layout.block_size
    assert layout.cacheable(full, min(longest, n - 1)) <= layout.cacheable(n, n - 1)
    if layout.first_destination(n) is None:
        assert layout.cacheable(full, n - 1) == n - 1
