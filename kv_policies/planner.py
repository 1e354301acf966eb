# SPDX-License-Identifier: Apache-2.0
"""Plans what a step compacts: once, for all groups of layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.base import KVPolicy, first_observed
from kv_policies.layout.base import Layout
from kv_policies.layout.segments import Ending, IntArray, runs
from kv_policies.layout.step import Step
from kv_policies.plan import Choice, Part, Queries, Tally, Work
from kv_policies.recent_queries import RecentQueries
from kv_policies.transfer import to_device
from kv_policies.workspace import Workspace


class Planner:
    """Plans what a step compacts, for all layouts of one timing together.

    They cut requests into the same segments, so most of it is done once for all of them. What a
    group of layers adds is its block table.

    Args:
        layouts: Of one timing.
        policy: What scores.
        space: What bounds a part.
        recent: Queries that decode windows are scored with; None: they are scored without.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        policy: KVPolicy,
        space: Workspace,
        recent: RecentQueries | None = None,
    ) -> None:
        self.layouts, self.policy, self.space = list(dict.fromkeys(layouts)), policy, space
        self.recent = recent

    def work(self, layout: Layout, step: Step, table: torch.Tensor) -> Work | None:
        """What a step has to do; None for nothing, as in most steps.

        Args:
            layout: Of the group.
            step: The requests, R rows.
            table: Physical block of each column, int [R, C], on any device.
        """
        columns, device = table.shape[1], table.device
        works = step.once((self, columns), lambda: self._works(step, columns, device))
        work = works.get(layout)
        if work is None:
            return None
        prompts, windows = ([part.on(table) for part in x] for x in (work.prompts, work.windows))
        return Work(prompts, windows, work.tallies)

    def _works(self, step: Step, columns: int, device: torch.device) -> dict[Layout, Work]:
        """By layout, of all that requests asked for."""
        works: dict[Layout, Work] = {}
        for amount, some in step.by_amount():
            layouts = [layout.for_request(amount) for layout in self.layouts]
            made = _Plan(self, layouts, some, columns, device).works()
            for served, layout in zip(self.layouts, layouts, strict=True):
                if (more := made.get(layout)) is not None:
                    work = works.setdefault(served, Work([], [], []))
                    work.prompts.extend(more.prompts)
                    work.windows.extend(more.windows)
                    work.tallies.extend(more.tallies)
        return works


class _Watched(NamedTuple):
    """Prompt positions ``[start, stop)`` whose queries are observed, the first of them being
    ``token`` among the step's tokens; ``first``: none were observed before."""

    start: int
    stop: int
    token: int
    first: bool


class _Plan:
    """Makes the works of one step, with places in a flat table in place of blocks."""

    def __init__(
        self,
        planner: Planner,
        layouts: Sequence[Layout],
        step: Step,
        columns: int,
        device: torch.device,
    ) -> None:
        self._planner, self._layouts, self._step = planner, layouts, step
        self._columns, self._device = columns, device
        self._works = {layout: Work([], [], []) for layout in layouts}
        self._reads: dict[tuple[bytes, ...], Part] = {}
        self._observed: dict[tuple[tuple[int, _Watched], ...], Queries] = {}

    def works(self) -> dict[Layout, Work]:
        """By layout; one that has nothing to do is not there."""
        ending = self._step.ending(self._layouts[0])
        wanted = self._wanted()
        if not ending and not wanted:
            return {}
        watched = {layout: self._watched(layout, wanted) for layout in self._works if wanted}
        for kind, segments in ending.items():
            self._compact_all(kind, segments, watched if kind == "prompt" else {})
        for layout, seen in watched.items():
            self._observe(layout, {at: x for at, x in seen.items() if x.stop < self._step.n[at]})
        return {
            layout: work for layout, work in self._works.items() if work.prompts or work.windows
        }

    def _wanted(self) -> list[tuple[int, int, int, int]]:
        """Prompts with queries in this step that the policy wants: row, n, c, and where they stop.

        Most chunks of a prompt lie in front of all of them.
        """
        step, policy = self._step, self._planner.policy
        if not policy.capabilities.needs_queries:
            return []
        rows = ((step.c < step.n) & (step.q > 0)).nonzero()[0].tolist()
        found = [(row, int(step.n[row]), int(step.c[row]), int(step.end[row])) for row in rows]
        return [
            (row, n, c, min(n, end))
            for row, n, c, end in found
            if min(n, end) > min(policy.first_query(n), n - 1)
        ]

    def _watched(
        self, layout: Layout, wanted: list[tuple[int, int, int, int]]
    ) -> dict[int, _Watched]:
        """By row, what is observed in this step."""
        watched = {}
        for row, n, c, stop in wanted:
            if not layout.gap(n):
                continue
            begin = first_observed(self._planner.policy, layout, n)
            if (start := max(begin, c)) < stop:
                token = int(self._step.starts[row]) + start - c
                watched[row] = _Watched(start, stop, token, c <= begin)
        return watched

    def _compact_all(
        self, kind: str, segments: Ending, watched: dict[Layout, dict[int, _Watched]]
    ) -> None:
        """Add parts that compact segments of this kind."""
        size = segments.stop - segments.start
        kept = {
            layout: layout.stays(segments.n, segments.start, segments.stop)
            for layout in self._works
        }
        alike: dict[bytes, list[Layout]] = {}  # layouts that compact the same of them
        for layout, stays in kept.items():
            alike.setdefault((stays < size).tobytes(), []).append(layout)
        for compacted, layouts in alike.items():
            which = np.frombuffer(compacted, bool)
            if which.any():
                stays = np.stack([kept[layout][which] for layout in layouts])
                self._compact(kind, segments.some(which), layouts, stays, watched)

    def _compact(
        self,
        kind: str,
        segments: Ending,
        layouts: list[Layout],
        kept: IntArray,
        watched: dict[Layout, dict[int, _Watched]],
    ) -> None:
        """Add parts that compact segments, of which ``kept`` [layouts, S] columns stay."""
        size = layouts[0].block_size
        tokens = (segments.stop - segments.start) * size
        lengths = segments.n if kind == "prompt" else tokens
        for some in self._planner.space.rows(lengths.tolist()):
            choices = self._choices(segments.some(some), kept[:, some], size)
            row, start = segments.row[some], segments.start[some]
            last = self._last(row, segments.ends[some]) if kind == "window" else None
            for layout, choice in zip(layouts, choices, strict=True):
                seen = watched.get(layout, {})
                part = self._part(row, lengths[some], start, size, seen, choice)
                part = part._replace(recent=last)
                work = self._works[layout]
                (work.prompts if kind == "prompt" else work.windows).append(part)
        count, total = len(tokens), int(tokens.sum())
        for layout, columns in zip(layouts, kept.sum(1).tolist(), strict=True):
            self._works[layout].tallies.append(Tally(kind, count, total, columns * size))

    def _observe(self, layout: Layout, watched: dict[int, _Watched]) -> None:
        """Add parts of prompts that do not end in this step."""
        if not watched:
            return
        row = np.array(list(watched))
        lengths = np.array([seen.stop for seen in watched.values()])
        for some in self._planner.space.rows(lengths.tolist()):
            part = self._part(
                row[some], lengths[some], 0 * row[some], layout.block_size, watched, None
            )
            self._works[layout].prompts.append(part)

    def _part(
        self,
        row: IntArray,
        lengths: IntArray,
        start: IntArray,
        size: int,
        watched: dict[int, _Watched],
        choice: Choice | None,
    ) -> Part:
        """A part of segments that begin at columns ``start``. Layouts share what is equal."""
        key = row.tobytes(), lengths.tobytes(), start.tobytes()
        if key not in self._reads:
            count = -(-lengths // size)
            columns = start[:, None] + np.minimum(np.arange(count.max()), count[:, None] - 1)
            blocks, there = self._there(self._places(row[:, None], columns), lengths)
            self._reads[key] = Part(
                blocks, there, lengths.tolist(), columns.shape[1] * size, None, None
            )
        queries = None
        if watched:
            queries = self._queries(tuple((at, watched[at]) for at in row.tolist()))
        return self._reads[key]._replace(queries=queries, choice=choice)

    def _choices(self, segments: Ending, kept: IntArray, size: int) -> list[Choice]:
        """What stays of segments in each layout: ``kept`` columns, [layouts, S]."""
        item, block = runs(kept.ravel())  # the segments of all layouts, one behind the other
        row = item % len(segments.row)
        column = (segments.stop - kept).ravel()[item] + block
        places, tokens = self._places(segments.row[row], column), kept * size
        stop = kept.sum(1).cumsum().tolist()
        of_layouts = [slice(a, b) for a, b in zip([0, *stop], stop, strict=False)]
        choosable, *there = self._there(
            (segments.stop - segments.start) * size,
            *tokens,
            *(x[some] for x in (places, row, block) for some in of_layouts),
        )
        each = (there[at :: len(kept)] for at in range(len(kept)))
        return [
            Choice(choosable, staying, most, *blocks)
            for (staying, *blocks), most in zip(each, tokens.max(1).tolist(), strict=True)
        ]

    def _queries(self, watched: tuple[tuple[int, _Watched], ...]) -> Queries:
        """Rows, and what is observed of each. Layouts share what is equal."""
        if watched not in self._observed:
            rows, ranges = zip(*watched, strict=True)
            start, stop, token, first = (np.array(x)[:, None] for x in zip(*ranges, strict=True))
            count = stop - start
            offset = np.arange(count.max())
            tokens, positions = self._there(
                token + np.minimum(offset, count - 1),
                np.where(offset < count, start + offset, -1),
            )
            names = [self._step.ids[row] for row in rows]
            self._observed[watched] = Queries(tokens, positions, names, first[:, 0].tolist())
        return self._observed[watched]

    def _last(self, row: IntArray, ends: IntArray) -> torch.Tensor | None:
        """Where the last queries of decode windows are stored."""
        if (recent := self._planner.recent) is None:
            return None
        names = [self._step.ids[at] for at in row.tolist()]
        return self._there(recent.last(names, ends))[0]

    def _places(self, row: IntArray, column: IntArray) -> IntArray:
        """Where the flat table has the blocks of these columns."""
        return row * self._columns + column

    def _there(self, *arrays: IntArray) -> list[torch.Tensor]:
        return to_device(self._device, *arrays)
