# SPDX-License-Identifier: Apache-2.0
"""Layouts of one timing are planned together, and each gets what it would get alone."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.compaction import workspace
from kv_policies.latents.columns import LatentColumns
from kv_policies.latents.fixed import FixedColumns, FixedView
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import LatentView
from kv_policies.layout.base import Layout
from kv_policies.layout.view import LiveColumns, LiveView
from kv_policies.planner import Planner
from kv_policies.registry import build_policy
from kv_policies.workspace import Heads
from tests.kv_policies.layout.sims import KEEPS, Unit, latent_layouts, token_layouts
from tests.support.layout_sim import step_of

POLICY = build_policy("snap_kv", {"window": 8})
# So little memory that most steps are cut into parts.
SPACE = replace(workspace(POLICY, Heads(1, 1, 8, 4, "cpu")), limit=1 << 14)
STEPS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 250), st.integers(1, 60)),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=3,
)


def alike(layouts: list[Any]) -> list[list[Any]]:
    """The layouts by timing."""
    timings: dict[object, list[Layout]] = {}
    for layout in layouts:
        timings.setdefault(layout.timing, []).append(layout)
    return list(timings.values())


def plain(x: object) -> object:
    """What was planned, to compare."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, (list, tuple)):
        return [plain(each) for each in x]
    return plain(list(vars(x).values())) if hasattr(x, "__dict__") else x


@given(token_layouts(), st.lists(KEEPS, min_size=1, max_size=3), STEPS)
@settings(deadline=None, max_examples=100)
def test_chosen_tokens(
    first: Any, keeps: list[Any], steps: list[list[tuple[int, int, int]]]
) -> None:
    width = 400 // first.block_size + 1
    for layouts in alike([first, *(replace(first, keep=keep) for keep in keeps)]):
        planner, live = Planner(layouts, POLICY, SPACE), LiveColumns(layouts)
        views = [LiveView(layout, live) for layout in layouts]
        for rows in steps:
            step = step_of(*rows)
            for layout, view in zip(layouts, views, strict=True):
                table = torch.randperm(len(rows) * width).view(len(rows), width).int()
                lengths = torch.from_numpy(step.end)
                alone = Planner([layout], POLICY, SPACE).work(layout, step_of(*rows), table)
                assert plain(planner.work(layout, step, table)) == plain(alone)
                seen = view.update(step, table, lengths)
                want = LiveView(layout).update(step_of(*rows), table, lengths)
                assert torch.equal(seen[1], want[1])
                for row, tokens in enumerate(want[1].tolist()):
                    blocks = -(-tokens // layout.block_size)
                    assert torch.equal(seen[0][row, :blocks], want[0][row, :blocks])


@given(latent_layouts(), st.lists(st.integers(0, 5), min_size=1, max_size=3), STEPS)
@settings(deadline=None, max_examples=100)
def test_latents(first: Any, more: list[int], steps: list[list[tuple[int, int, int]]]) -> None:
    base, unit = first
    width = 400 // base.block_size + 1
    layouts = [base, *(replace(base, tokens=base.tokens + unit * extra) for extra in more)]
    forms = {layout: Unit(1, 1, 16, layout.tokens, unit) for layout in layouts}
    packer, columns = Packer(list(forms.items())), LatentColumns(layouts)
    views = [LatentView(layout, columns) for layout in layouts]
    for rows in steps:
        step = step_of(*rows)
        for layout, view in zip(layouts, views, strict=True):
            table = torch.randperm(len(rows) * width).view(len(rows), width).int()
            form = forms[layout]
            alone = Packer([(layout, form)]).work(layout, step_of(*rows), table)
            assert plain(packer.work(layout, step, table)) == plain(alone)
            reading = view.update(step, table, table)
            assert plain(reading) == plain(LatentView(layout).update(step_of(*rows), table, table))


@given(latent_layouts(), st.lists(st.integers(0, 5), min_size=1, max_size=3), STEPS)
@settings(deadline=None, max_examples=100)
def test_latents_of_decode_steps(
    first: Any, more: list[int], steps: list[list[tuple[int, int, int]]]
) -> None:
    """In the same memory as in the first step: the same blocks, behind which is nothing."""
    base, unit = first
    width = 400 // base.block_size + 1
    layouts = [base, *(replace(base, tokens=base.tokens + unit * extra) for extra in more)]
    columns = FixedColumns(layouts)
    views = [FixedView(layout, columns) for layout in layouts]
    places: dict[int, set[Any]] = {}
    for rows in steps:
        step = step_of(*((n, n + c, 1) for n, c, _ in rows))
        for at, (layout, view) in enumerate(zip(layouts, views, strict=True)):
            table = torch.randperm(len(rows) * width).view(len(rows), width).int()
            raw, seen = LiveView(layout).update(step, table, torch.from_numpy(step.end))
            fixed = view.update(step, table, raw, seen, rows=5)
            blocks, contents = fixed.blocks, fixed.contents
            assert contents.per_block == layout.tokens and fixed.whole
            some = (contents.first, contents.count, blocks, fixed.tokens)
            places.setdefault(at, set()).add(tuple((x.data_ptr(), x.stride(0)) for x in some))
            assert fixed.tokens.tolist() == [[row] for row in range(len(rows))]
            exact = LatentView(layout).update(step, table, raw)
            aged = (contents.count.sum(1) > 0).nonzero().flatten()
            if exact is None:
                assert not len(aged)
                continue
            assert exact.tokens.flatten().tolist() == aged.tolist()
            assert torch.equal(exact.seen, fixed.seen[aged])
            length = exact.blocks.shape[1]
            for wide, narrow in (
                (blocks, exact.blocks),
                (contents.first, exact.contents.first),
                (contents.count, exact.contents.count),
            ):
                assert torch.equal(wide[aged, :length], narrow)
            assert not contents.count[:, length:].any()
            assert torch.equal(
                blocks[aged, length:], blocks[aged, :1].expand_as(blocks[aged, length:])
            )
    assert all(len(seen) == 1 for seen in places.values())
