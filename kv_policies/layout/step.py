# SPDX-License-Identifier: Apache-2.0
"""The requests of one engine step, and what a layout makes of them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from kv_policies.layout.base import Amount, Layout
from kv_policies.layout.segments import Ending, IntArray, runs

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The requests of a step, a row each, on the host. All groups of layers share it.

    Attributes:
        n: Prompt length per row, int64 [R]; 0 where nothing is compacted: rows that pad the batch,
            and requests that opted out.
        c: Computed tokens before the step, int64 [R].
        q: Tokens of the step, int64 [R].
        starts: First token of each row among the step's tokens, int64 [R].
        ids: Names of the rows, without those that pad the batch.
        asked: What each of these requests asked for: see ``Layout.asked``; None where none did.
    """

    n: IntArray
    c: IntArray
    q: IntArray
    starts: IntArray
    ids: list[str]
    asked: tuple[Amount | None, ...] | None = None
    _memory: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first called for ``key`` in this step."""
        if key not in self._memory:
            self._memory[key] = make()
        made: T = self._memory[key]
        return made

    @cached_property
    def end(self) -> IntArray:
        """Computed tokens after the step, int64 [R]."""
        return self.c + self.q

    def ending(self, layout: Layout) -> dict[str, Ending]:
        """``Layout.ending`` of the step."""
        return self.once(("ending", layout.timing), lambda: layout.ending(self.n, self.c, self.q))

    def phase(self, layout: Layout) -> IntArray:
        """``Layout.phase`` before the step."""
        return self.once(("phase", layout.timing), lambda: layout.phase(self.n, self.c))

    def passes(self, layout: Layout) -> "list[tuple[IntArray | None, Step]]":
        """The step as ``Layout.substeps``.

        Returns:
            Per pass the tokens that take part, int64 [tokens], or None for all of them, and the
            rows of the pass.
        """
        ending = [
            of_kind
            for amount, some in self.by_amount()
            for of_kind in some.ending(layout.for_request(amount)).values()
        ]
        if all((of_kind.ends == self.end[of_kind.row]).all() for of_kind in ending):
            return [(None, self)]
        rows = zip(self.n.tolist(), self.c.tolist(), self.q.tolist(), strict=True)
        asked = self.asked or (None,) * len(self.ids)
        steps = [
            layout.for_request(amount).substeps(*row)
            for amount, row in zip(asked, rows, strict=False)
        ]
        if all(len(cuts) == 1 for cuts in steps):
            return [(None, self)]
        return [
            self._part([(row, *cuts[at]) for row, cuts in enumerate(steps) if at < len(cuts)])
            for at in range(max(map(len, steps)))
        ]

    def _part(self, cuts: list[tuple[int, int, int]]) -> "tuple[IntArray, Step]":
        row, c, q = np.array(cuts).T
        starts = self.starts[row] + c - self.c[row]
        index, token = runs(q)
        ids = [self.ids[at] for at in row.tolist()]
        asked = self.asked and tuple(self.asked[at] for at in row.tolist())
        return starts[index] + token, Step(self.n[row], c, q, starts, ids, asked)

    def by_amount(self) -> "list[tuple[Amount | None, Step]]":
        """The step for each amount that requests asked for.

        Requests of other amounts keep everything in it, as if they had opted out. So what has to be
        done for the step is what has to be done for all of these.
        """
        return self.once("amounts", self._by_amount) if self.asked else [(None, self)]

    def _by_amount(self) -> "list[tuple[Amount | None, Step]]":
        assert self.asked is not None
        found = []
        for amount in dict.fromkeys(self.asked):
            n = 0 * self.n
            rows = [row for row, other in enumerate(self.asked) if other == amount]
            n[rows] = self.n[rows]
            found.append((amount, Step(n, self.c, self.q, self.starts, self.ids)))
        return found
