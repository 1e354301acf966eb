# SPDX-License-Identifier: Apache-2.0
"""The requests of one engine step, and what a layout makes of them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from kv_policies.layout.base import IntArray, Layout, Segments, runs

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
    """

    n: IntArray
    c: IntArray
    q: IntArray
    starts: IntArray
    ids: list[str]
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

    @cached_property
    def prefilling(self) -> list[int]:
        """Rows with tokens of a prompt that is compacted when it ends."""
        rows: list[int] = ((self.c < self.n) & (self.q > 0)).nonzero()[0].tolist()
        return rows

    def ending(self, layout: Layout) -> Segments | None:
        """Segments to compact at the end of the step; None where none can end, as in most steps."""
        if not self.once(("ends", layout.timing), lambda: self._ends(layout)):
            return None
        ending = self.once(layout, lambda: layout.ending(self.n, self.c, self.q))
        return ending if len(ending.row) else None

    def _ends(self, layout: Layout) -> bool:
        """Whether a prompt or a window of a timing ends."""
        prompts = (self.c < self.n) & (self.n <= self.end)
        return bool((prompts | (layout.windows(self.n, self.end) > self.phase(layout)[1])).any())

    def phase(self, layout: Layout) -> IntArray:
        """``Layout.phase`` before the step."""
        return self.once(("phase", layout.timing), lambda: layout.phase(self.n, self.c))

    def passes(self, layout: Layout) -> "list[tuple[torch.Tensor | None, Step]]":
        """The step as ``Layout.substeps``.

        Returns:
            Per pass the tokens that take part, int64 [tokens], or None for all of them, and the
            rows of the pass.
        """
        ending = self.ending(layout)
        if ending is None or bool((ending.ends == self.end[ending.row]).all()):
            return [(None, self)]
        rows = zip(self.n.tolist(), self.c.tolist(), self.q.tolist(), strict=True)
        steps = [layout.substeps(*row) for row in rows][: len(self.ids)]
        return [
            self._part([(row, *cuts[at]) for row, cuts in enumerate(steps) if at < len(cuts)])
            for at in range(max(map(len, steps)))
        ]

    def _part(self, cuts: list[tuple[int, int, int]]) -> "tuple[torch.Tensor, Step]":
        row, c, q = np.array(cuts).T
        starts = self.starts[row] + c - self.c[row]
        index, token = runs(q)
        ids = [self.ids[at] for at in row.tolist()]
        tokens = torch.from_numpy(starts[index] + token)
        return tokens, Step(self.n[row], c, q, starts, ids)
