# SPDX-License-Identifier: Apache-2.0
"""What a step reads of latents, and what it turns into latents: block numbers, for all layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.latents.format import LatentFormat
from kv_policies.layout.base import IntArray, Segments, runs
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step
from kv_policies.plan import Tally, tallies
from kv_policies.workspace import LIMIT


@dataclass(frozen=True)
class Held:
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


@dataclass(frozen=True)
class Reading:
    """What attention reads for the R requests of a step that have latents.

    Attributes:
        tokens: Each query among the step's tokens, int64 [R, Q], padded with a request's last one.
        seen: Raw tokens that each query sees, int64 [R, Q].
        raw: Blocks of these, int64 [R, C].
        blocks: Blocks of latents, int64 [R, L].
        held: What is in them.
        whole: These are all requests of the step.
    """

    tokens: torch.Tensor
    seen: torch.Tensor
    raw: torch.Tensor
    blocks: torch.Tensor
    held: Held
    whole: bool

    @cached_property
    def narrow(self) -> dict[str, torch.Tensor]:
        """For kernels, int32: ``row`` and ``seen`` [R * Q], ``raw``, ``blocks``, ``first`` and
        ``count``. Converted once for all layers.
        """
        requests, queries = self.tokens.shape
        row = torch.arange(requests, device=self.tokens.device).repeat_interleave(queries)
        tensors = {
            "row": row,
            "seen": self.seen.flatten(),
            "raw": self.raw,
            "blocks": self.blocks,
            "first": self.held.first,
            "count": self.held.count,
        }
        return {name: tensor.int() for name, tensor in tensors.items()}

    @cached_property
    def _parts(self) -> dict[tuple[int, int], list["Reading"]]:
        return {}

    def parts(self, rows: int, queries: int) -> list["Reading"]:
        """The reading in parts. Made once for all layers that cut it alike.

        Args:
            rows: Requests of a part.
            queries: Query tokens of each.
        """
        if rows >= len(self.tokens) and queries >= self.tokens.shape[1]:
            return [self]
        if (rows, queries) not in self._parts:
            self._parts[rows, queries] = [
                part
                for row in range(0, len(self.tokens), rows)
                for part in self._some(slice(row, row + rows), queries)
            ]
        return self._parts[rows, queries]

    def _some(self, rows: slice, queries: int) -> Iterator["Reading"]:
        """Parts of some requests, which share what they hold."""
        first, count = self.held.first[rows], self.held.count[rows]
        held = Held(first, count, self.held.per_block, self.held.longest)
        for query in range(0, self.tokens.shape[1], queries):
            some = rows, slice(query, query + queries)
            yield Reading(
                self.tokens[some].contiguous(),
                self.seen[some].contiguous(),
                self.raw[rows],
                self.blocks[rows],
                held,
                self.whole,
            )


class _Aged(NamedTuple):
    """Requests of a step that have latents: the same for layouts of one timing.

    Attributes:
        rows: Their rows, int64 [R].
        index: The same on the device.
        tokens: See ``Reading``.
        seen: See ``Reading``.
        columns: Columns of raw blocks of the request with most.
        whole: See ``Reading``.
    """

    rows: IntArray
    index: torch.Tensor
    tokens: torch.Tensor
    seen: torch.Tensor
    columns: int
    whole: bool


class LatentView:
    """What attention reads of latents. Planned anew only when what is latents has changed."""

    def __init__(self, layout: LatentLayout) -> None:
        self._layout = layout
        self._phase = np.zeros((2, 0), np.int64)

    def update(self, step: Step, table: torch.Tensor, view: torch.Tensor) -> Reading | None:
        """The reading of a step; None where no request has latents.

        Args:
            step: The requests, R rows.
            table: Physical block of each column, int [R, C].
            view: Raw blocks of each request, moved left, as ``table``.
        """
        if not self._layout.tokens:
            return None
        layout, device = self._layout, table.device
        aged = step.once(("aged", layout.timing), lambda: _aged(layout, step, device))
        if not len(aged.rows):
            return None
        if not np.array_equal(phase := step.phase(layout)[:, aged.rows], self._phase):
            self._plan(phase, device)
        raw = view[:, : aged.columns]
        return Reading(
            tokens=aged.tokens,
            seen=aged.seen,
            raw=(raw if len(aged.rows) == len(view) else raw[aged.index]).long(),
            blocks=table[aged.index[:, None], self._column].long(),
            held=self._held,
            whole=aged.whole,
        )

    def _plan(self, phase: IntArray, device: torch.device) -> None:
        self._phase, spans = phase, self._layout.spans(phase)
        self._column, first, count = (
            torch.from_numpy(x).to(device, non_blocking=True)
            for x in self._layout.latent_blocks(spans)
        )
        self._held = Held(first, count, self._layout.tokens, int(spans.old.max()))


def _aged(layout: LatentLayout, step: Step, device: torch.device) -> _Aged:
    old = layout.hidden(step.phase(layout))
    rows = (old > 0).nonzero()[0]
    q, raw = step.q[rows, None], (step.end - old)[rows, None]
    # Padding repeats the last query, so that it may be written twice.
    query = np.minimum(np.arange(q.max(initial=0)), q - 1)
    index, tokens, seen = (
        torch.from_numpy(x).to(device, non_blocking=True)
        for x in (rows, step.starts[rows, None] + query, raw - (q - 1 - query))
    )
    columns = -(-int(raw.max(initial=0)) // layout.block_size)
    return _Aged(rows, index, tokens, seen, columns, len(rows) == int((step.q > 0).sum()))


class Packing(NamedTuple):
    """Raw tokens that become latents in a step, in P pieces of ``Layout.unit`` tokens.

    Attributes:
        blocks: Raw blocks of each piece, int64 [P, C].
        first: Position of the first token of each piece, int64 [P].
        destination: The block that each unit of latents goes to, int64 [P * units per piece].
        slot: The unit of that block, int64, as ``destination``.
        fresh: Blocks among these that hold no latents yet, int64 [F].
    """

    blocks: torch.Tensor
    first: torch.Tensor
    destination: torch.Tensor
    slot: torch.Tensor
    fresh: torch.Tensor


@dataclass(frozen=True)
class Packings:
    """What one step has to pack, for every layer of one layout.

    Attributes:
        parts: Some requests each.
        tallies: What metrics count.
    """

    parts: list[Packing]
    tallies: list[Tally]


def plan_packing(
    layout: LatentLayout, form: LatentFormat, table: torch.Tensor, step: Step
) -> Packings | None:
    """What a step has to pack; None for nothing, as in most steps.

    Args:
        layout: The layout of the layers.
        form: How latents lie in a block.
        table: Physical block of each column, int [R, C].
        step: The requests, R rows.
    """
    ending = step.ending(layout)
    if ending is None:
        return None
    # Encoded latents of a part are all held before they are written, twice for a moment.
    most = max(1, LIMIT // 2 // (2 * -(-form.bytes(4) // form.tokens)))
    whole = ((ending.stop - ending.start) * layout.block_size).cumsum() // most
    parts = [
        _packing(layout, form.unit, table, step, ending.some(whole == part))
        for part in np.unique(whole)
    ]
    return Packings(parts, tallies(ending, layout.block_size))


def _packing(
    layout: LatentLayout, unit: int, table: torch.Tensor, step: Step, ending: Segments
) -> Packing:
    row, size = ending.row, layout.block_size
    # The prompt is complete by the end of the step.
    start, prompt, _ = layout.spans(np.stack((step.n[row], 0 * row)))
    columns = layout.unit // size
    at, piece = runs((ending.stop - ending.start) // columns)
    first = ending.start[at] + piece * columns
    # Latents of the request in front of each unit that is written.
    units = np.arange(layout.unit // unit) * unit
    before = ((first * size - start[at])[:, None] + units).ravel()
    of_unit = at.repeat(len(units))
    destination = layout.column(before // layout.tokens, start[of_unit], prompt[of_unit])
    of_block, index = runs(ending.kept)
    held = layout.blocks(ending.start * size - start)
    fresh = layout.column((held[of_block] + index), start[of_block], prompt[of_block])

    def there(array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(table.device, non_blocking=True)

    rows = row[at]
    return Packing(
        blocks=table[there(rows)[:, None], there(first[:, None] + np.arange(columns))].long(),
        first=there(first * size),
        destination=table[there(row[of_unit]), there(destination)].long(),
        slot=there(before % layout.tokens // unit),
        fresh=table[there(row[of_block]), there(fresh)].long(),
    )


def fresh_blocks(layout: LatentLayout, step: Step, table: torch.Tensor) -> torch.Tensor | None:
    """Blocks that a step begins to fill and does not finish, int64 [F]; None if there are none.

    They may have held latents of another request. Read as keys and values these bytes can be NaN,
    and a kernel that multiplies what lies behind the last token with zero would spread it.

    Args:
        layout: The layout of the layers.
        step: The requests, R rows.
        table: Physical block of each column, int [R, C].
    """
    device = table.device
    begun = step.once(("begun", layout.block_size), lambda: _begun(layout, step, device))
    return None if begun is None else table[begun].long()


def _begun(
    layout: LatentLayout, step: Step, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and columns of ``fresh_blocks``."""
    size, end = layout.block_size, step.end
    last = (end - 1) // size
    rows = ((end % size > 0) & (step.q > 0) & (last * size >= step.c)).nonzero()[0]
    if not len(rows):
        return None
    return torch.from_numpy(rows).to(device), torch.from_numpy(last[rows]).to(device)
