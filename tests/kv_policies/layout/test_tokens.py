# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from kv_policies.layout.base import Segment
from kv_policies.layout.tokens import TokenLayout
from tests.support.layout_sim import Sim, live

KEEPS = st.fractions(min_value=Fraction(1, 60), max_value=1, max_denominator=60)


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    block_size = draw(st.integers(2, 8))
    return TokenLayout(
        block_size,
        draw(KEEPS),
        window=block_size * draw(st.integers(0, 5)),
        min_blocks=draw(st.integers(1, 3)),
        min_prompt=block_size * draw(st.integers(0, 6)),
    )


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_picture_of_the_module_text() -> None:
    layout = TokenLayout(16, Fraction(1, 4), window=64)
    n = 8 * 16 + 5
    assert layout.freed(n, n - 1) == []
    assert layout.freed(n, n) == [(0, 6)]
    assert layout.live(n, n, 9) == [6, 7, 8]
    c = 17 * 16
    assert layout.freed(n, c) == [(0, 6), (9, 12), (13, 16)]
    assert layout.live(n, c, 19) == [6, 7, 8, 12, 16, 17, 18]
    assert layout.seq_len(n, c, 1) == 5 * 16 + 1
    assert layout.ending(n, c - 1, 1) == [Segment(13, 17, 1, c)]
    table, seq_lens = layout.view(torch.arange(19)[None], tensor(n), tensor(c), tensor(1))
    assert table[0, :7].tolist() == [6, 7, 8, 12, 16, 17, 18]
    assert seq_lens.tolist() == [81]


def test_resumed_step_is_cut_at_the_prompt_and_at_each_window() -> None:
    layout = TokenLayout(16, Fraction(1, 4), window=64)
    n = 8 * 16 + 5
    steps = layout.substeps(n, 32, 300 - 32)
    assert steps == [(32, n - 32), (n, 13 * 16 - n), (13 * 16, 64), (17 * 16, 300 - 17 * 16)]
    assert layout.substeps(n, 0, n) == [(0, n)]
    assert layout.substeps(n, 17 * 16 - 1, 1) == [(17 * 16 - 1, 1)]


def test_caching_limits() -> None:
    layout = TokenLayout(16, Fraction(1, 4), window=64)
    n = 8 * 16 + 5
    assert layout.cacheable(n, 10**6) == layout.hit_limit(n) == 6 * 16
    # Nothing evicted from this prompt: exact until the first window's destination.
    assert layout.cacheable(10, 10**6) == (1 + 3) * 16
    assert layout.opted_out().cacheable(n, 999) == 999
    assert layout.opted_out().hit_limit(n) == 8 * 16
    assert layout.opted_out().hit_limit(8 * 16) == 7 * 16  # one token must be computed


def test_bad_arguments_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        TokenLayout(16, Fraction(5, 4), window=40, min_blocks=0, min_prompt=-1)
    assert "4 problems" in str(caught.value)
    with pytest.raises(CompressError, match="exact Fraction"):
        TokenLayout(16, 0.25)  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="at least 2"):
        TokenLayout(1, Fraction(1))


@given(layouts(), st.integers(1, 120), st.integers(1, 300))
@settings(deadline=None)
def test_the_full_blocks_of_a_prompt_tell_how_far_a_hit_may_reach(
    layout: TokenLayout, n: int, longest: int
) -> None:
    full = n // layout.block_size * layout.block_size
    assert layout.cacheable(full, min(longest, n - 1)) <= layout.cacheable(n, n - 1)
    if layout.first_destination(n) is None:
        assert layout.cacheable(full, n - 1) == n - 1


@given(layouts(), st.integers(1, 120), st.integers(0, 300))
@settings(deadline=None)
def test_segments_are_disjoint_ordered_and_of_exact_size(
    layout: TokenLayout, n: int, c: int
) -> None:
    bs = layout.block_size
    at = 0
    for segment in layout.segments(n, c):
        assert at <= segment.start < segment.stop
        assert segment.stop * bs <= max(c, n) and segment.ends <= c
        size = segment.stop - segment.start
        share = layout.keep * size
        assert segment.kept == min(size, max(layout.min_blocks, -(-share // 1)))
        assert segment.freed[1] == segment.destination[0]
        at = segment.stop
    if c < n:
        assert not layout.freed(n, c)
    columns = -(-c // bs)
    live = layout.live(n, c, columns)
    assert live == sorted(set(live))
    assert layout.seq_len(n, c, 0) == c - (columns - len(live)) * bs
    assert n // bs == 0 or layout.gap(n) < n // bs
    if layout.keep == 1:
        assert live == list(range(columns))


@given(layouts(), st.integers(1, 120), st.lists(st.integers(1, 60), min_size=1, max_size=12))
@settings(deadline=None)
def test_any_chunking_ends_the_same_segments(
    layout: TokenLayout, n: int, chunks: list[int]
) -> None:
    c, seen = 0, []
    for q in chunks:
        seen += layout.ending(n, c, q)
        steps = layout.substeps(n, c, q)
        assert steps[0][0] == c and sum(size for _, size in steps) == q
        assert all(a + size == b for (a, size), (b, _) in zip(steps, steps[1:], strict=False))
        for a, size in steps:  # at most one segment ends in a sub-step, with its last token
            assert [s.ends for s in layout.ending(n, a, size)] in ([], [a + size])
        c += q
    assert seen == list(layout.segments(n, c))
    middle = c // 2
    assert layout.freed(n, middle) + layout.freed(n, c, after=middle) == layout.freed(n, c)


@given(
    layouts(),
    st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 250), st.integers(0, 130), st.booleans()),
        min_size=1,
        max_size=6,
    ),
)
@settings(deadline=None, max_examples=300)
def test_batched_form_agrees_with_the_scalar_form(
    layout: TokenLayout, rows: list[tuple[int, int, int, bool]]
) -> None:
    n, c, q, opted_out = (torch.tensor(column) for column in zip(*rows, strict=True))
    width = -(-max(a + b for _, a, b, _ in rows) // layout.block_size) + 1
    table = torch.randperm(len(rows) * width).view(len(rows), width).int()
    before = table.clone()
    view, seq_lens = layout.view(table, n, c, q, opted_out)
    assert torch.equal(table, before)
    expected = []
    for row, (n_, c_, q_, out_) in enumerate(rows):
        scalar = layout.opted_out() if out_ else layout
        columns = -(-(c_ + q_) // layout.block_size)
        live = scalar.live(n_, c_, columns)
        assert view[row, : len(live)].tolist() == table[row, live].tolist()
        assert seq_lens[row] == scalar.seq_len(n_, c_, q_)
        assert -(-int(seq_lens[row]) // layout.block_size) == len(live)
        expected += [(row, *segment) for segment in scalar.ending(n_, c_, q_)]
    batch = layout.ending_batch(n, c, q, opted_out)
    if bool((batch.start > 0).any()):  # what a worker asks first must not miss a window
        assert layout.window_ends(n, c, q)
    assert list(zip(*(x.tolist() for x in batch), strict=True)) == expected


class TokenSim(Sim[TokenLayout]):
    """Tokens are chosen by a number that each has."""

    def attend(self, c: int, q: int) -> None:
        view, seq_lens = self.layout.view(
            tensor(*self.table)[None], tensor(self.n), tensor(c), tensor(q)
        )
        seen = [token for block in view[0].tolist() for token in self.blocks[block]]
        assert seen[: int(seq_lens)] == self.expected(c, q)

    def expected(self, c: int, q: int) -> list[object]:
        """What step [c, c + q) must see, from the rules in words: kept tokens, then raw ones."""
        bs, lay = self.layout.block_size, self.layout
        bounds = [(0, self.n // bs, self.n, self.n >= lay.min_prompt)]
        at = -(-self.n // bs)
        while lay.window and at * bs + lay.window <= c:
            size = lay.window // bs
            bounds.append((at, at + size, (at + size) * bs, True))
            at += size
        seen: list[object] = []
        done = 0
        for start, stop, ends, compacts in bounds:
            if ends > c or lay.kept(stop - start) == stop - start or not compacts:
                continue
            seen += [("raw", p) for p in range(done, start * bs)]
            seen += self.chosen(start, stop, lay.kept(stop - start))
            done = stop * bs
        return seen + [("raw", p) for p in range(done, c + q)]

    def chosen(self, start: int, stop: int, kept: int) -> list[object]:
        bs = self.layout.block_size
        order = sorted(range(start * bs, stop * bs), key=lambda p: (p * 7919) % 101)
        return [("raw", p) for p in sorted(order[: kept * bs])]

    def compact(self, c: int, q: int) -> None:
        bs = self.layout.block_size
        for segment in self.layout.ending(self.n, c, q):
            source = [
                token
                for column in range(segment.start, segment.stop)
                for token in self.blocks[self.table[column]]
            ]
            kept = self.chosen(segment.start, segment.stop, segment.kept)
            assert source == [("raw", p) for p in range(segment.start * bs, segment.stop * bs)]
            for i, column in enumerate(range(*segment.destination)):
                self.blocks[self.own(column)] = kept[i * bs : (i + 1) * bs]


@given(layouts(), st.integers(1, 70), st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=200)
def test_every_interleaving_reads_the_right_tokens(
    layout: TokenLayout, n: int, lag: int, data: st.DataObject
) -> None:
    live(TokenSim(layout, n, lag), data)
