# SPDX-License-Identifier: Apache-2.0
"""What a step turns into latents: block numbers, made once for all layers of one timing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.latents.format import LatentFormat
from kv_policies.layout.latents import LatentLayout, latent_columns
from kv_policies.layout.segments import Ending, IntArray, runs
from kv_policies.layout.step import Step
from kv_policies.plan import Tally
from kv_policies.transfer import to_device
from kv_policies.workspace import LIMIT


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

    def on(self, table: torch.Tensor) -> "Packing":
        """With blocks of a table, where so far there are places in the flat table."""
        return self._replace(
            blocks=table.take(self.blocks).long(),
            destination=table.take(self.destination).long(),
            fresh=table.take(self.fresh).long(),
        )


@dataclass(frozen=True)
class Packings:
    """What one step has to pack, for every layer of one layout.

    Attributes:
        parts: Some requests each.
        tallies: What metrics count.
    """

    parts: list[Packing]
    tallies: list[Tally]


class Packer:
    """Plans what a step packs, for all layouts of one timing together: as ``Planner``.

    Args:
        forms: Layouts of one timing, and how latents of a group lie in a block. The forms are of
            one policy, so that latents are written in units of one size.
    """

    def __init__(self, forms: Sequence[tuple[LatentLayout, LatentFormat]]) -> None:
        self._layouts = list(dict.fromkeys(layout for layout, _ in forms))
        self._forms = [form for _, form in forms]
        self._tokens = np.array([layout.tokens for layout in self._layouts])

    def work(self, layout: LatentLayout, step: Step, table: torch.Tensor) -> Packings | None:
        """What a step has to pack; None for nothing, as in most steps.

        Args:
            layout: Of the group.
            step: The requests, R rows.
            table: Physical block of each column, int [R, C].
        """
        columns, device = table.shape[1], table.device
        plans = step.once((self, columns), lambda: self._plan(step, columns, device))
        if (plan := plans.get(layout)) is None:
            return None
        return Packings([part.on(table) for part in plan.parts], plan.tallies)

    def _plan(self, step: Step, columns: int, device: torch.device) -> dict[LatentLayout, Packings]:
        """By layout, with places in a flat table in place of blocks."""
        ending = step.ending(self._layouts[0])
        if not ending:
            return {}
        plans = {layout: Packings([], []) for layout in self._layouts}
        # Encoded latents of a part are all held before they are written, twice for a moment.
        each = max(-(-form.bytes(4) // form.tokens) for form in self._forms)
        most = max(1, LIMIT // 2 // (2 * each))
        for kind, segments in ending.items():
            size = self._layouts[0].block_size
            tokens = (segments.stop - segments.start) * size
            kept = np.stack(
                [
                    layout.stays(segments.n, segments.start, segments.stop)
                    for layout in self._layouts
                ]
            )
            part = tokens.cumsum() // most
            for which in (part == number for number in np.unique(part)):
                packings = self._packings(segments.some(which), kept[:, which], columns, device)
                for plan, packing in zip(plans.values(), packings, strict=True):
                    plan.parts.append(packing)
            count, total = len(tokens), int(tokens.sum())
            for plan, stays in zip(plans.values(), kept.sum(1).tolist(), strict=True):
                plan.tallies.append(Tally(kind, count, total, stays * size))
        return plans

    def _packings(
        self, segments: Ending, kept: IntArray, columns: int, device: torch.device
    ) -> list[Packing]:
        """For each layout; ``kept`` [layouts, S] columns of the segments stay."""
        layout, unit, row = self._layouts[0], self._forms[0].unit, segments.row
        size, tokens, requests = layout.block_size, self._tokens[:, None], len(segments.row)
        # The prompt is complete by the end of the step.
        start, prompt, _ = layout.spans(np.stack((segments.n, 0 * segments.n)))
        each = layout.unit // size
        at, piece = runs((segments.stop - segments.start) // each)
        first = segments.start[at] + piece * each
        # Latents of the request in front of each unit that is written.
        units = np.arange(layout.unit // unit) * unit
        before = ((first * size - start[at])[:, None] + units).ravel()
        of_unit = at.repeat(len(units))
        destination = row[of_unit] * columns + latent_columns(
            layout, tokens, before // tokens, start[of_unit], prompt[of_unit]
        )
        # New blocks of all layouts, one layout behind the other.
        item, index = runs(kept.ravel())
        request, held = item % requests, -(-(segments.start * size - start) // tokens)
        fresh = row[request] * columns + latent_columns(
            layout,
            self._tokens[item // requests],
            held.ravel()[item] + index,
            start[request],
            prompt[request],
        )
        blocks, position, *there = to_device(
            device,
            row[at][:, None] * columns + first[:, None] + np.arange(each),
            first * size,
            *destination,
            *(before % tokens // unit),
            *np.split(fresh, kept.sum(1).cumsum()[:-1]),
        )
        of_layouts = (there[at :: len(kept)] for at in range(len(kept)))
        return [Packing(blocks, position, *fields) for fields in of_layouts]


def fresh_blocks(layout: LatentLayout, step: Step, table: torch.Tensor) -> torch.Tensor | None:
    """Blocks that a step begins to fill and does not finish, int64 [F]; None if there are none.

    They may have held latents of another request. Read as keys and values these bytes can be NaN,
    and a kernel that multiplies what lies behind the last token with zero would spread it.

    Args:
        layout: The layout of the layers.
        step: The requests, R rows.
        table: Physical block of each column, int [R, C].
    """
    size, columns, device = layout.block_size, table.shape[1], table.device
    begun = step.once(("begun", size, columns), lambda: _begun(size, step, columns, device))
    return None if begun is None else table.take(begun).long()


def _begun(size: int, step: Step, columns: int, device: torch.device) -> torch.Tensor | None:
    """Places of ``fresh_blocks`` in a flat table."""
    end = step.end
    last = (end - 1) // size
    rows = ((end % size > 0) & (step.q > 0) & (last * size >= step.c)).nonzero()[0]
    return to_device(device, rows * columns + last[rows])[0] if len(rows) else None
