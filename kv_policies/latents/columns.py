# SPDX-License-Identifier: Apache-2.0
"""Which columns hold latents, and of which tokens: planned once for all layouts of one timing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.layout.latents import LatentLayout, latent_blocks
from kv_policies.layout.segments import IntArray
from kv_policies.layout.step import Step
from kv_policies.transfer import to_device


@dataclass(frozen=True)
class Contents:
    """The latents of R requests. Steps share it until some of them change.

    Attributes:
        first: Position of the first token of each latent block, int64 [R, L].
        count: Tokens in it, int64 [R, L]; 0 pads a request.
        per_block: Tokens that a block could hold.
        longest: Tokens of the request that has most.
    """

    first: torch.Tensor
    count: torch.Tensor
    per_block: int
    longest: int

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position of each token of the blocks, int64 [R, longest]; 0 where there is none."""
        positions = (self.first[..., None] + self._at).flatten(1)[:, : self.longest]
        return positions.where(self.hidden == 0, 0)

    @cached_property
    def hidden(self) -> torch.Tensor:
        """0 for each token of the latent blocks, -inf where there is none: float [R, longest]."""
        hidden = torch.where(self._at < self.count[..., None], 0.0, -torch.inf)
        return hidden.flatten(1)[:, : self.longest]

    @property
    def _at(self) -> torch.Tensor:
        return torch.arange(self.per_block, device=self.first.device)


class Aged(NamedTuple):
    """Requests of a step that have latents: the same for layouts of one timing.

    Attributes:
        rows: Their rows, int64 [R].
        some: The same on the device; None where these are all rows.
        tokens: See ``Reading``.
        seen: See ``Reading``.
        columns: Columns of raw blocks of the request with most.
        whole: See ``Reading``.
    """

    rows: IntArray
    some: torch.Tensor | None
    tokens: torch.Tensor
    seen: torch.Tensor
    columns: int
    whole: bool


class LatentColumns:
    """Which columns hold the latents of each request, in all layouts of one timing.

    Requests are planned again only where what is latents has changed, for all layouts together.
    """

    def __init__(self, layouts: Sequence[LatentLayout]) -> None:
        self.layouts = list(dict.fromkeys(layouts))
        self._key: tuple[object, ...] = ()
        self._phase = np.zeros((2, 0), np.int64)
        # Column, first position and tokens of each block, [3, layouts, R, L].
        self._blocks = np.zeros((3, len(self.layouts), 0, 0), np.int64)
        self._planned: list[tuple[torch.Tensor, Contents]] = []

    def update(
        self, step: Step, table: torch.Tensor
    ) -> tuple[Aged, list[tuple[torch.Tensor, Contents]]] | None:
        """What ``LatentView`` reads; None where no request has latents. Groups share it in a step.

        Args:
            step: The requests, R rows.
            table: Of any group: all have one shape.

        Returns:
            The requests, and for each layout the places of their latent blocks in a flat table,
            int64 [R, L], and what is in them.
        """
        columns, device = table.shape[1], table.device
        return step.once((self, columns), lambda: self._update(step, columns, device))

    def _update(
        self, step: Step, columns: int, device: torch.device
    ) -> tuple[Aged, list[tuple[torch.Tensor, Contents]]] | None:
        aged = _aged(self.layouts[0], step, device)
        if not len(aged.rows):
            return None
        phase = step.phase(self.layouts[0])[:, aged.rows]
        key = columns, device, aged.rows.tobytes()
        if key != self._key or not np.array_equal(phase, self._phase):
            self._plan(phase)
            self._key, self._phase = key, phase
            self._planned = self._there(aged.rows * columns, device)
        return aged, self._planned

    def _plan(self, phase: IntArray) -> None:
        """Plan the requests that moved."""
        rows = np.arange(phase.shape[1])
        if phase.shape == self._phase.shape:
            rows = (phase != self._phase).any(0).nonzero()[0]
        if not len(rows):
            return  # others than before, of the same lengths
        blocks = np.stack(latent_blocks(self.layouts, self.layouts[0].spans(phase[:, rows])))
        if len(rows) == phase.shape[1]:
            self._blocks = blocks
        else:
            width = max(blocks.shape[-1], self._blocks.shape[-1])
            # A copy: tensors of steps before may be in this memory.
            self._blocks = padded(self._blocks, width)
            self._blocks[:, :, rows] = padded(blocks, width)

    def _there(self, first: IntArray, device: torch.device) -> list[tuple[torch.Tensor, Contents]]:
        """What was planned, on the device; ``first`` [R] is where the rows of a table begin."""
        column, position, count = self._blocks
        longest = int(count.sum(2).max())
        widths = count.any(1).sum(1).tolist()
        places = column + first[:, None]
        there = to_device(
            device,
            *(
                of_layout[:, :width]
                for field in (places, position, count)
                for of_layout, width in zip(field, widths, strict=True)
            ),
        )
        size = len(self.layouts)
        return [
            (there[at], Contents(there[at + size], there[at + 2 * size], layout.tokens, longest))
            for at, layout in enumerate(self.layouts)
        ]


def padded(blocks: IntArray, width: int) -> IntArray:
    """Padded to ``width`` blocks with a request's first one: in others there may be anything."""
    padding = blocks[..., :1].repeat(width - blocks.shape[-1], -1)
    padding[2] = 0
    return np.concatenate((blocks, padding), -1)


def _aged(layout: LatentLayout, step: Step, device: torch.device) -> Aged:
    old = layout.hidden(step.phase(layout))
    rows = (old > 0).nonzero()[0]
    q, raw = step.q[rows, None], (step.end - old)[rows, None]
    # Padding repeats the last query, so that it may be written twice.
    query = np.minimum(np.arange(q.max(initial=0)), q - 1)
    index, tokens, seen = to_device(
        device, rows, step.starts[rows, None] + query, raw - (q - 1 - query)
    )
    columns = -(-int(raw.max(initial=0)) // layout.block_size)
    some = None if len(rows) == len(step.n) else index
    return Aged(rows, some, tokens, seen, columns, len(rows) == int((step.q > 0).sum()))
