# SPDX-License-Identifier: Apache-2.0
"""What attention reads of a group of layers, step after step, in the same memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kv_policies.layout.base import Amount, Layout
from kv_policies.layout.segments import IntArray
from kv_policies.layout.step import Step
from kv_policies.transfer import to_device

_UNKNOWN = np.zeros((3, 0), np.int64)  # of no rows
_MOST_AMOUNTS = 1024  # that are told apart
# Columns are gathered in multiples of so many: in most steps, the same memory as in the one before.
_COLUMNS = 32


class LiveColumns:
    """Which columns of each request are live, in all layouts of one timing.

    That changes when a segment ends, or when another request takes a row. Only rows where it did
    are planned again, of all layouts together. Columns are planned for the longest request of a
    step, so the cost does not depend on the longest request that the engine allows.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = list(dict.fromkeys(layouts))
        self._phase = _UNKNOWN  # of the rows that are planned, and which amount each asked for
        self._amounts: dict[Amount | None, int] = {None: 0}
        self._hidden = np.zeros((0, 0), np.int64)  # [layouts, rows]
        self._columns = torch.zeros(0, 0, 0, dtype=torch.int64)  # [layouts, rows, columns]
        self._unseen = self._seen = torch.zeros(0, 0)  # hidden tokens on the device; all others
        self._table: tuple[int, torch.device | None] = 0, None  # columns, device
        self._shape: tuple[int, int] | None = None
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, step: Step, table: torch.Tensor, lengths: torch.Tensor, rows: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What ``LiveView`` gathers. Groups share it in a step.

        Args:
            step: See ``LiveView.update``, as the rest.
            table: Of any group: all have one shape.
            lengths: Of all groups.
            rows: Most rows of any step.

        Returns:
            For each layout the live columns, int64 [R, W], and the tokens seen, as ``lengths`` [R].
            What lies behind the last live column of a row is any column. It is the same list, in
            the same memory, as long as its shapes are.
        """
        return step.once(self, lambda: self._update(step, table, lengths, rows))

    def _update(
        self, step: Step, table: torch.Tensor, lengths: torch.Tensor, rows: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        count, most = table.shape
        if count > self._hidden.shape[1] or self._table != (most, table.device):
            self._table = most, table.device
            self._reserve(max(rows, count), lengths)
        phase = np.vstack((step.phase(self.layouts[0]), self._asked(step)))
        stale = moved(self._phase, phase)
        self._phase = phase
        for some, layouts in self._alike(stale):
            theirs = phase[:2, some]
            self._hidden[:, some] = [layout.hidden(theirs) for layout in layouts]
        longest = int((step.end - self._hidden[:, :count]).max())
        step_size = self.layouts[0].block_size * _COLUMNS
        width = min(-(-longest // step_size) * _COLUMNS, most)
        if width > self._columns.shape[2]:
            # Twice the width: a request that decodes must not be planned anew all the time.
            self._columns = self._columns.new_zeros(*self._unseen.shape, min(2 * width, most))
            self._shape, stale = None, np.arange(count)
        if len(stale):
            self._plan(stale)
        if self._shape != (count, width):
            self._shape = count, width
            parts = self._columns[:, :count, :width], self._seen[:, :count]
            self._parts = list(zip(*parts, strict=True))
        torch.sub(lengths, self._unseen[:, :count], out=self._seen[:, :count])
        return self._parts

    def _asked(self, step: Step) -> IntArray:
        """Which amount each row asked for, as a number."""
        kinds = np.zeros(len(step.n), np.int64)
        if step.asked is not None:
            if len(self._amounts) > _MOST_AMOUNTS:
                self._amounts, self._phase = {None: 0}, _UNKNOWN
            numbers = [self._amounts.setdefault(x, len(self._amounts)) for x in step.asked]
            kinds[: len(numbers)] = numbers
        return kinds

    def _alike(self, rows: IntArray) -> Iterator[tuple[IntArray, list[Layout]]]:
        """Rows that asked for the same, and their layouts."""
        kinds = self._phase[2, rows]
        for amount, kind in list(self._amounts.items()) if kinds.any() else [(None, 0)]:
            if len(some := rows[kinds == kind]):
                yield some, [layout.for_request(amount) for layout in self.layouts]

    def _plan(self, rows: IntArray) -> None:
        """Plan some rows."""
        hidden, width = self._hidden[:, rows], self._columns.shape[2]
        columns = np.zeros((*hidden.shape, width), np.int64)
        at = np.zeros(self._hidden.shape[1], np.int64)
        at[rows] = np.arange(len(rows))
        for some, layouts in self._alike(rows):
            phase = self._phase[:2, some]
            for number, layout in enumerate(layouts):
                theirs = self._hidden[number, some]
                columns[number, at[some]] = layout.columns(phase, theirs, width)
        np.minimum(columns, self._table[0] - 1, out=columns)
        there, columns_there, hidden_there = to_device(self._columns.device, rows, columns, hidden)
        self._columns.index_copy_(1, there, columns_there)
        self._unseen.index_copy_(1, there, hidden_there.to(self._unseen.dtype))

    def _reserve(self, rows: int, lengths: torch.Tensor) -> None:
        """Make room; nothing is planned any more."""
        shape = len(self.layouts), rows
        self._phase, self._shape = _UNKNOWN, None
        self._hidden = np.zeros(shape, np.int64)
        self._unseen, self._seen = lengths.new_zeros(shape), lengths.new_zeros(shape)
        self._columns = lengths.new_zeros(*shape, 0, dtype=torch.int64)


class LiveView:
    """The live blocks of each request, moved left, and the tokens that are seen in them.

    Args:
        layout: Of a group of layers.
        columns: Shared by the groups whose layouts have this timing.
    """

    def __init__(self, layout: Layout, columns: LiveColumns | None = None) -> None:
        self._all = columns or LiveColumns([layout])
        self._index = self._all.layouts.index(layout)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._table = torch.zeros(0, 0)

    def update(
        self, step: Step, table: torch.Tensor, lengths: torch.Tensor, rows: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table and the lengths that the kernel gets.

        Args:
            step: The requests, R rows.
            table: Physical block of each column, int [R, C]. It is not written.
            lengths: Computed tokens, those of the step included, int [R].
            rows: Most rows of any step, so that the memory need not grow.

        Returns:
            Live blocks, as ``table`` [R, C], and tokens seen, as ``lengths`` [R]. Both are
            overwritten by the next call. Blocks that no token of a row is in are any blocks.
        """
        parts = self._all.update(step, table, lengths, rows)
        if parts is not self._parts:
            self._slice(parts, table, rows)
        torch.gather(table, 1, self._columns, out=self._live)
        return self._view, self._seen

    def _slice(
        self, parts: list[tuple[torch.Tensor, torch.Tensor]], table: torch.Tensor, rows: int
    ) -> None:
        """Cut what later steps of this shape use, which takes longer than to fill it."""
        self._parts, (self._columns, self._seen) = parts, parts[self._index]
        (count, most), known = table.shape, self._table
        if count > len(known) or most != known.shape[1] or known.device != table.device:
            self._table = table.new_zeros(max(rows, count), most)
        self._view = self._table[:count]
        self._live = self._view[:, : self._columns.shape[1]]


def moved(before: IntArray, phase: IntArray) -> IntArray:
    """Rows whose phase is not what it was."""
    rows = np.ones(phase.shape[1], bool)
    there = min(phase.shape[1], before.shape[1])
    rows[:there] = (phase[:, :there] != before[:, :there]).any(0)
    return rows.nonzero()[0]
