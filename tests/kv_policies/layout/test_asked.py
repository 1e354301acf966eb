# SPDX-License-Identifier: Apache-2.0
"""Requests that ask for less than is served, beside others in one engine."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.layout.base import Amount, Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from kv_policies.plan import Part
from kv_policies.planner import Planner
from tests.kv_policies.layout.sims import KEEPS, TokenSim, bounded_layouts, token_layouts
from tests.kv_policies.layout.test_shared import POLICY, SPACE, STEPS
from tests.support.layout_sim import live, step_of


@st.composite
def served_and_asked(draw: st.DrawFn) -> tuple[Layout, list[Amount | None]]:
    """A layout, and what several requests ask for."""
    layout: Layout
    if draw(st.booleans()):
        layout = draw(token_layouts())
        amounts: st.SearchStrategy[Amount] = KEEPS.filter(lambda keep: keep <= layout.keep)
    else:
        layout = draw(bounded_layouts())
        amounts = st.integers(2 * layout.window, layout.budget)
    return layout, draw(st.lists(st.none() | amounts, min_size=5, max_size=5))


@given(token_layouts(), KEEPS, st.integers(1, 120), st.integers(0, 300))
@settings(deadline=None, max_examples=200)
def test_a_hit_that_is_safe_where_served_is_safe_where_asked(
    layout: TokenLayout, keep: Fraction, n: int, tokens: int
) -> None:
    asked = layout.asked(min(keep, layout.keep))
    assert layout.cacheable(n, tokens) <= asked.cacheable(n, tokens)
    assert layout.hit_limit(n) <= asked.hit_limit(n)
    # A request takes no more than one that asks for nothing.
    assert sum(b - a for a, b in layout.freed(n, n + tokens)) <= sum(
        b - a for a, b in asked.freed(n, n + tokens)
    )


@given(token_layouts(), KEEPS, st.data())
@settings(deadline=None, max_examples=100)
def test_every_interleaving_reads_what_was_asked_for(
    layout: TokenLayout, keep: Fraction, data: st.DataObject
) -> None:
    sim = TokenSim(
        layout.asked(min(keep, layout.keep)),
        n=data.draw(st.integers(1, 70)),
        lag=data.draw(st.integers(0, 2)),
    )
    live(sim, data)


@given(served_and_asked(), STEPS, st.data())
@settings(deadline=None, max_examples=150)
def test_requests_of_a_step_get_what_each_would_get_alone(
    drawn: tuple[Layout, list[Amount | None]],
    steps: list[list[tuple[int, int, int]]],
    data: st.DataObject,
) -> None:
    layout, amounts = drawn
    width = 400 // layout.block_size + 1
    view, planner = LiveView(layout), Planner([layout], POLICY, SPACE)
    for rows in steps:
        asked = tuple(data.draw(st.permutations(amounts))[: len(rows)])
        step = replace(step_of(*rows), asked=asked, _memory={})
        table = torch.randperm(len(rows) * width).view(len(rows), width).int()
        live_blocks, seen = view.update(step, table, torch.from_numpy(step.end))
        parts: list[Part] = []
        for row, (amount, numbers) in enumerate(zip(asked, rows, strict=True)):
            own, alone = layout.for_request(amount), step_of(numbers)
            end = torch.from_numpy(alone.end)
            want, tokens = LiveView(own).update(alone, table[row : row + 1], end)
            assert int(seen[row]) == int(tokens)
            blocks = -(-int(tokens) // layout.block_size)
            assert torch.equal(live_blocks[row, :blocks], want[0, :blocks])
            assert np.array_equal(own.phase(alone.n, alone.c), layout.phase(alone.n, alone.c))
            work = Planner([own], POLICY, SPACE).work(own, alone, table[row : row + 1])
            parts += [*work.prompts, *work.windows] if work else []
        work = planner.work(layout, step, table)
        together = [*work.prompts, *work.windows] if work else []
        assert written(together) == written(parts)


def written(parts: list[Part]) -> list[tuple[Any, ...]]:
    """Each block that is filled: the segment that its tokens come from, how many of it stay, and
    which of these go there."""
    found = []
    for part in parts:
        if (choice := part.choice) is None:
            continue
        for block, row, place in zip(
            choice.destination.tolist(),
            choice.source_row.tolist(),
            choice.source_block.tolist(),
            strict=True,
        ):
            length = int(part.lengths[row])
            columns = -(-length // (part.tokens // part.blocks.shape[1]))
            source = tuple(part.blocks[row, :columns].tolist())
            kept = int(choice.kept[row])
            found.append((block, source, length, kept, place))
    return sorted(found)


@given(served_and_asked(), STEPS, st.data())
@settings(deadline=None, max_examples=100)
def test_passes_are_cut_where_each_request_needs_it(
    drawn: tuple[Layout, list[Amount | None]],
    steps: list[list[tuple[int, int, int]]],
    data: st.DataObject,
) -> None:
    layout, amounts = drawn
    for rows in steps:
        asked = tuple(data.draw(st.permutations(amounts))[: len(rows)])
        step = replace(step_of(*rows), asked=asked, _memory={})
        cuts: dict[str, list[tuple[int, int]]] = {}
        for _, passed in step.passes(layout):
            for at, name in enumerate(passed.ids):
                cuts.setdefault(name, []).append((int(passed.c[at]), int(passed.q[at])))
                if passed.asked is not None:
                    assert passed.asked[at] == asked[int(name)]
        for row, (amount, (n, c, q)) in enumerate(zip(asked, rows, strict=True)):
            assert cuts[str(row)] == layout.for_request(amount).substeps(n, c, q)


def test_more_than_is_served_is_an_error() -> None:
    with pytest.raises(ValueError, match="a request asked for 1/2, of layers that keep 1/4"):
        TokenLayout(16, Fraction(1, 4)).asked(Fraction(1, 2))
    with pytest.raises(ValueError, match="a request asked for 128 tokens, the budget is 96"):
        BoundedLayout(16, 96, 16).asked(128)
    with pytest.raises(ValueError, match="asked for 64"):
        TokenLayout(16, Fraction(1, 4)).asked(64)


def test_an_amount_that_there_is_not_is_what_is_served() -> None:
    """What a request may ask for is checked by the engine that a process configured last."""
    share = TokenLayout(32, Fraction(1, 4), window=64)
    budget = BoundedLayout(32, 256, 64)
    assert share.for_request(Fraction(1, 2)) is share and share.for_request(100) is share
    assert budget.for_request(512) is budget and budget.for_request(Fraction(1, 8)) is budget
    assert budget.for_request(1) is budget  # less than two windows
    assert share.for_request(Fraction(1, 8)) == share.asked(Fraction(1, 8))
