# SPDX-License-Identifier: Apache-2.0
"""Both engine sides of a layout with real blocks, under any interleaving."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from hypothesis import strategies as st

from kv_policies.layout.base import Layout
from kv_policies.layout.step import Step

L = TypeVar("L", bound=Layout)


def step_of(*rows: tuple[int, int, int]) -> Step:
    """A step of requests with n, c and q; their names are "0", "1", .."""
    n, c, q = np.array(rows, np.int64).T
    return Step(n, c, q, q.cumsum() - q, [str(row) for row in range(len(rows))])


def live_columns(layout: Layout, n: int, c: int, columns: int) -> list[int]:
    """The columns below ``columns`` that are not free at c."""
    freed = {at for first, stop in layout.freed(n, c) for at in range(first, stop)}
    return [column for column in range(columns) if column not in freed]


@dataclass
class Sim(Generic[L]):
    """A block is what its tokens are, or foreign. The worker only ever sees (table, n, c, q); the
    scheduler frees what has settled, and a freed block is overwritten by someone else at once.

    ``attend`` checks what a step sees, ``compact`` does what it has to. ``prompt``: tokens of the
    prompt, of which the layout compacts ``n`` as one; 0: all.
    """

    layout: L
    n: int
    lag: int
    blocks: list[list[object]] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)
    null: set[int] = field(default_factory=set)
    in_flight: list[tuple[int, int]] = field(default_factory=list)
    c: int = 0
    prompt: int = 0

    def attend(self, c: int, q: int) -> None:
        raise NotImplementedError

    def compact(self, c: int, q: int) -> None:
        raise NotImplementedError

    def own(self, column: int) -> int:
        """The block of a column, which may be written: it is nobody else's, and not hashed."""
        assert column not in self.shared and column not in self.null
        assert column * self.layout.block_size >= self.layout.cacheable(self.n, 10**9)
        return self.table[column]

    def start(self, hit: int) -> None:
        """(Re)start from a prefix-cache hit: shared blocks that others read too."""
        bs = self.layout.block_size
        self.table, self.null, self.in_flight, self.c = [], set(), [], hit
        self.shared = set(range(hit // bs))
        for column in sorted(self.shared):
            self._allocate([("raw", column * bs + i) for i in range(bs)])

    def _allocate(self, content: list[object]) -> None:
        self.table.append(len(self.blocks))
        self.blocks.append(content)

    def step(self, q: int) -> None:
        """Schedule one step; the worker runs ``lag`` steps behind."""
        bs = self.layout.block_size
        processed = self.c - sum(size for _, size in self.in_flight)
        for first, stop in self.layout.freed(self.n, processed):
            for column in set(range(first, stop)) - self.null:
                self.null.add(column)
                if column not in self.shared:
                    self.blocks[self.table[column]] = ["foreign"] * bs
        while len(self.table) * bs < self.c + q:
            self._allocate(["empty"] * bs)
        self.in_flight.append((self.c, q))
        self.c += q
        self.drain(self.lag)

    def drain(self, left: int = 0) -> None:
        """Worker: new tokens are written first, then the sub-steps run."""
        bs = self.layout.block_size
        while len(self.in_flight) > left:
            c, q = self.in_flight.pop(0)
            for position in range(c, c + q):
                self.blocks[self.table[position // bs]][position % bs] = ("raw", position)
            for start, size in self.layout.substeps(self.n, c, q):
                self.attend(start, size)
                self.compact(start, size)


def live(sim: Sim[L], data: st.DataObject) -> None:
    """Chunked prefill, decode, preemption and resume, freed blocks reused, steps in flight."""
    limit = sim.layout.hit_limit(sim.n) // sim.layout.block_size
    target = 0
    for _ in range(data.draw(st.integers(1, 4), label="lives")):
        sim.start(data.draw(st.integers(0, limit), label="hit blocks") * sim.layout.block_size)
        goal = max(sim.n, sim.prompt, target) + data.draw(st.integers(0, 60), label="new tokens")
        budget = data.draw(st.integers(1, 90), label="tokens per step")
        while sim.c < goal:
            # The prompt, and what was generated before the preemption.
            known = max(sim.n, sim.prompt, target)
            sim.step(min(budget, known - sim.c) if sim.c < known else 1)
        sim.drain()
        target = goal
