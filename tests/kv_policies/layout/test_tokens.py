# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from kv_policies.layout.segments import Segment
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from tests.kv_policies.layout.sims import token_layouts
from tests.support.layout_sim import live_columns, step_of


def plain(layout: TokenLayout, n: int, c: int) -> list[Segment]:
    """The segments that are compacted at c, by the rules in words, one token after the other."""
    bs, found, columns = layout.block_size, [], n // layout.block_size
    if n == 0:
        return []
    for at in range(1, c + 1):
        if at == n:
            start, size, compacted = 0, columns, n >= layout.min_prompt
        else:
            boundary = -(-n // bs) * bs
            if not layout.window or at <= boundary or (at - boundary) % layout.window:
                continue
            start, size, compacted = (at - layout.window) // bs, layout.window // bs, True
        kept = 0
        while kept < size and (kept < layout.min_blocks or Fraction(kept, size) < layout.keep):
            kept += 1
        if compacted and kept < size:
            found.append(Segment(start, start + size, kept, at))
    return found


def test_picture_of_the_module_text() -> None:
    layout = TokenLayout(16, Fraction(1, 4), window=64)
    n = 8 * 16 + 5
    assert layout.freed(n, n - 1) == []
    assert layout.freed(n, n) == [(0, 6)]
    assert live_columns(layout, n, n, 9) == [6, 7, 8]
    c = 17 * 16
    assert layout.freed(n, c) == [(0, 6), (9, 12), (13, 16)]
    assert live_columns(layout, n, c, 19) == [6, 7, 8, 12, 16, 17, 18]
    assert list(layout.segments(n, c, after=c - 1)) == [Segment(13, 17, 1, c)]
    view, seen = LiveView(layout).update(
        step_of((n, c, 1)), torch.arange(19)[None], torch.tensor([c + 1])
    )
    assert view[0, :6].tolist() == [6, 7, 8, 12, 16, 17]
    assert seen.tolist() == [5 * 16 + 1]


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
    everything = TokenLayout(16, Fraction(1), window=64)
    assert everything.cacheable(n, 999) == 999
    assert everything.hit_limit(n) == 8 * 16
    assert everything.hit_limit(8 * 16) == 7 * 16  # one token must be computed


def test_bad_arguments_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        TokenLayout(16, Fraction(5, 4), window=40, min_blocks=0, min_prompt=-1)
    assert "4 problems" in str(caught.value)
    with pytest.raises(CompressError, match="exact Fraction"):
        TokenLayout(16, 0.25)  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="at least 2"):
        TokenLayout(1, Fraction(1))


@given(token_layouts(), st.integers(1, 120), st.integers(0, 300))
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
    assert list(layout.segments(n, c)) == plain(layout, n, c)
    assert n // bs == 0 or layout.gap(n) < n // bs
    if layout.keep == 1:
        assert not layout.freed(n, c)


@given(token_layouts(), st.integers(1, 120), st.lists(st.integers(1, 60), min_size=1, max_size=12))
@settings(deadline=None)
def test_any_chunking_ends_the_same_segments(
    layout: TokenLayout, n: int, chunks: list[int]
) -> None:
    c, seen = 0, []
    for q in chunks:
        seen += layout.segments(n, c + q, after=c)
        steps = layout.substeps(n, c, q)
        assert steps[0][0] == c and sum(size for _, size in steps) == q
        assert all(a + size == b for (a, size), (b, _) in zip(steps, steps[1:], strict=False))
        for a, size in steps:  # at most one segment ends in a sub-step, with its last token
            assert [s.ends for s in layout.segments(n, a + size, a)] in ([], [a + size])
        c += q
    assert seen == list(layout.segments(n, c))
    middle = c // 2
    assert layout.freed(n, middle) + layout.freed(n, c, after=middle) == layout.freed(n, c)


ROWS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 250), st.integers(0, 130), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(token_layouts(), st.lists(ROWS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
def test_a_batch_is_what_its_requests_are_alone(
    layout: TokenLayout, steps: list[list[tuple[int, int, int, bool]]]
) -> None:
    """Against the rules in words, over steps that share the memory of what was planned before."""
    view, bs = LiveView(layout), layout.block_size
    most = max(a + b for rows in steps for _, a, b, _ in rows)
    width = -(-most // bs) + 1
    for rows in steps:
        step = step_of(*((0 if out else n, c, q) for n, c, q, out in rows))
        table = torch.randperm(len(rows) * width).view(len(rows), width).int()
        before = table.clone()
        live, seen = view.update(step, table, torch.from_numpy(step.end), rows=6)
        assert torch.equal(table, before)
        expected = []
        for row, (n, c, q, out) in enumerate(rows):
            segments = [] if out else plain(layout, n, c)
            freed = {at for s in segments for at in range(*s.freed)}
            columns = [at for at in range(-(-(c + q) // bs)) if at not in freed]
            assert live[row, : len(columns)].tolist() == table[row, columns].tolist()
            assert seen[row] == c + q - len(freed) * bs
            after = [] if out else plain(layout, n, c + q)[len(segments) :]
            expected += [(row, *segment) for segment in after]
        found = []
        for kind, ending in step.ending(layout).items():
            kept = layout.stays(ending.n, ending.start, ending.stop)
            fields = ending.row, ending.start, ending.stop, kept, ending.ends
            rows = zip(*(x.tolist() for x in fields), strict=True)
            compacted = [x for x in rows if layout.compacts(x[2] - x[1], x[3])]
            assert {start == 0 for _, start, *_ in compacted} <= {kind == "prompt"}
            found += compacted
        assert sorted(found) == sorted(expected)


def test_rows_are_planned_again_only_where_something_moved() -> None:
    layout = TokenLayout(16, Fraction(1, 4), window=64)
    calls: list[int] = []
    widths: list[int] = []

    class Counted(TokenLayout):
        def columns(self, phase: np.ndarray, hidden: np.ndarray, width: int) -> np.ndarray:
            calls.append(phase.shape[1])
            widths.append(width)
            return layout.columns(phase, hidden, width)

    view, table = LiveView(Counted(16, Fraction(1, 4), window=64)), torch.arange(400).view(2, 200)
    for at in range(0, 96, 16):  # one request decodes, the other one's prompt comes in chunks
        step = step_of((128, 140 + at // 16, 1), (96, at, 16))
        view.update(step, table, torch.from_numpy(step.end))
    assert calls == [2]
    step = step_of((128, 146, 1), (96, 96, 1))  # the prompt has ended
    view.update(step, table, torch.from_numpy(step.end))
    assert calls == [2, 1]
    step = step_of((96, 97, 1))  # the first request is gone, the second one takes its row
    live, seen = view.update(step, table[1:], torch.from_numpy(step.end))
    assert calls == [2, 1, 1]
    assert live[0, :3].tolist() == [204, 205, 206] and seen.tolist() == [98 - 4 * 16]
    # The table is as wide as the longest request that the engine allows: 200 columns. In use are 9.
    assert max(widths) <= 64


def test_layouts_that_end_no_window_do_not_answer_for_those_that_do() -> None:
    """Layouts of one timing share one answer in a step."""
    ends, keeps = TokenLayout(16, Fraction(1, 4), window=64), TokenLayout(16, Fraction(1), 64)
    step: Step = step_of((128, 128 + 63, 1))
    assert not step.ending(keeps)
    assert step.ending(ends)
