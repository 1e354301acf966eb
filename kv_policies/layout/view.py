# SPDX-License-Identifier: Apache-2.0
"""What attention reads of a group of layers, step after step, in the same memory."""

import numpy as np
import torch

from kv_policies.layout.base import IntArray, Layout
from kv_policies.layout.step import Step

_NONE = np.zeros(0, np.int64)


class LiveView:
    """The live blocks of each request, moved left, and the tokens that are seen in them.

    Which columns are live changes when a segment ends, or when another request takes a row. Only
    rows where it did are planned again. Each step then gathers the columns that its longest request
    uses, so the cost does not depend on the longest request that the engine allows.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._phase = np.zeros((2, 0), np.int64)  # of the rows that are planned
        self._hidden = np.zeros(0, np.int64)
        self._columns = torch.zeros(0, 0, dtype=torch.int64)  # planned, [rows, columns]
        self._unseen = self._table = self._lengths = torch.zeros(0)

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
        count = len(table)
        phase = step.phase(self._layout)
        if self._columns.device != table.device or self._table.shape[1:] != table.shape[1:]:
            self._phase = self._phase[:, :0]
        if self._phase.shape[1] < count:
            self._reserve(max(rows, count), 0, table, lengths)
        changed = phase != self._phase[:, :count]
        stale = changed.any(0).nonzero()[0] if changed.any() else _NONE
        if len(stale):
            self._hidden[stale] = self._layout.hidden(phase[:, stale])
        width = -(-int((step.end - self._hidden[:count]).max()) // self._layout.block_size)
        width = min(width, table.shape[1])
        if width > self._columns.shape[1]:
            hidden = self._hidden[:count]
            # Twice the width: a request that decodes must not be planned anew with every block.
            self._reserve(len(self._table), min(2 * width, table.shape[1]), table, lengths)
            self._hidden[:count], stale = hidden, np.arange(count)
        if len(stale):
            self._plan(phase, stale, table)
        view, seen = self._table[:count], self._lengths[:count]
        torch.gather(table, 1, self._columns[:count, :width], out=view[:, :width])
        torch.sub(lengths, self._unseen[:count], out=seen)
        return view, seen

    def _plan(self, phase: IntArray, rows: IntArray, table: torch.Tensor) -> None:
        """Plan some rows."""
        phase = phase[:, rows]
        self._phase[:, rows] = phase
        columns = self._layout.columns(phase, self._columns.shape[1])
        np.minimum(columns, table.shape[1] - 1, out=columns)
        at, columns_there, hidden_there = (
            torch.from_numpy(x).to(table.device, non_blocking=True)
            for x in (rows, columns, self._hidden[rows])
        )
        self._columns.index_copy_(0, at, columns_there)
        self._unseen.index_copy_(0, at, hidden_there.to(self._unseen.dtype))

    def _reserve(self, rows: int, width: int, table: torch.Tensor, lengths: torch.Tensor) -> None:
        """Make room; nothing is planned any more."""
        self._phase = np.full((2, rows), -1)
        self._hidden = np.zeros(rows, np.int64)
        self._columns = torch.zeros(rows, width, dtype=torch.int64, device=table.device)
        self._unseen = lengths.new_zeros(rows)
        if self._table.shape != (rows, table.shape[1]):
            self._table = table.new_zeros(rows, table.shape[1])
            self._lengths = lengths.new_zeros(rows)
