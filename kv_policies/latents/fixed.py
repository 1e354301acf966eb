# SPDX-License-Identifier: Apache-2.0
"""What attention reads of latents in a decode step, in memory that stays where it is.

A CUDA graph of a decode step launches the same kernels over the same memory each time. So it reads
all columns that a request can ever have, and each step writes how much of them there is: 0 for rows
that pad the batch, and for requests without latents.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kv_policies.latents.columns import Contents, padded
from kv_policies.latents.reading import Reading
from kv_policies.layout.latents import LatentLayout, latent_blocks
from kv_policies.layout.step import Step
from kv_policies.layout.view import moved
from kv_policies.transfer import to_device


class FixedColumns:
    """Which columns hold the latents of each row, in all layouts of one timing.

    Only rows where that has changed are planned again, for all layouts together.
    """

    def __init__(self, layouts: Sequence[LatentLayout]) -> None:
        self.layouts = list(dict.fromkeys(layouts))
        self._phase = np.zeros((2, 0), np.int64)
        # Column, first position and tokens of each block, [3, layouts, rows, L].
        self._there = torch.zeros(3, 0, 0, 0, dtype=torch.int64)

    def update(self, step: Step, table: torch.Tensor, rows: int) -> torch.Tensor:
        """What ``FixedView`` reads. Groups share it in a step.

        Args:
            step: See ``FixedView.update``, as the rest.
            table: Of any group: all have one shape.
            rows: Most rows of any step.

        Returns:
            Column, first position and tokens of each latent block, int64 [3, layouts, R, L]. The
            next call overwrites it.
        """
        return step.once((self, table.shape), lambda: self._update(step, table, rows))

    def _update(self, step: Step, table: torch.Tensor, rows: int) -> torch.Tensor:
        count, columns = table.shape
        width = blocks_of(self.layouts, columns)
        if count > self._there.shape[2] or self._there.shape[3] != width:
            shape = 3, len(self.layouts), max(rows, count), width
            self._there = torch.zeros(shape, dtype=torch.int64, device=table.device)
            self._phase = self._phase[:, :0]
        phase = step.phase(self.layouts[0])
        stale = moved(self._phase, phase)
        self._phase = phase
        if len(stale):
            spans = self.layouts[0].spans(phase[:, stale])
            blocks = np.stack(latent_blocks(self.layouts, spans))
            if not blocks.shape[-1]:
                blocks = np.zeros((*blocks.shape[:-1], 1), np.int64)
            at, there = to_device(table.device, stale, padded(blocks, width))
            self._there.index_copy_(2, at, there)
        return self._there[:, :, :count]


class FixedView:
    """As ``LatentView``, of steps with one token per row.

    Args:
        layout: Of a group of layers.
        columns: Shared by the groups whose layouts have this timing.
    """

    def __init__(self, layout: LatentLayout, columns: FixedColumns | None = None) -> None:
        self._layout, self._all = layout, columns or FixedColumns([layout])
        self._index = self._all.layouts.index(layout)
        self._blocks, self._tokens = torch.zeros(0, 0), torch.zeros(0, 1)

    def update(
        self, step: Step, table: torch.Tensor, view: torch.Tensor, seen: torch.Tensor, rows: int
    ) -> Reading:
        """The reading of a step, of all its rows.

        It is made anew each time, so that what kernels derive from it is derived in the graph too.

        Args:
            step: The requests, R rows of one token each.
            table: Physical block of each column, int [R, C].
            view: See ``LiveView.update``: raw blocks, and the tokens ``seen`` in them.
            seen: int [R].
            rows: Most rows of any step, so that the memory need not grow.
        """
        count = len(table)
        width = blocks_of([self._layout], table.shape[1])
        column, first, tokens = self._all.update(step, table, rows)[:, self._index, :, :width]
        if count > len(self._blocks) or self._blocks.shape[1] != width:
            self._blocks = table.new_zeros(max(rows, count), width)
            self._tokens = torch.arange(len(self._blocks), device=table.device)[:, None]
        torch.gather(table, 1, column, out=self._blocks[:count])
        each = self._layout.tokens
        return Reading(
            tokens=self._tokens[:count],
            seen=seen[:, None],
            raw=view,
            blocks=self._blocks[:count],
            contents=Contents(first, tokens, each, width * each),
            whole=True,
        )


def blocks_of(layouts: Sequence[LatentLayout], columns: int) -> int:
    """Latent blocks of a request that fills so many columns, in the layout that has most."""
    return max(-(-columns * layout.block_size // (layout.tokens or 1)) for layout in layouts)
