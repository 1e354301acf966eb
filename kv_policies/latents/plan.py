# SPDX-License-Identifier: Apache-2.0
"""What a step reads of latents, and what it turns into latents: block numbers, for all layers."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kv_policies.compaction import Tally
from kv_policies.layout.base import runs
from kv_policies.layout.latents import LatentBlocks, LatentLayout
from kv_policies.layout.step import Step


@dataclass(frozen=True)
class Reading:
    """What attention reads for the R requests of a step that have latents.

    tokens: int64 [R, Q], each query among the step's tokens, padded with a request's last one.
    seen: int64 [R, Q], raw tokens that it sees. raw: int64 [R, C], blocks of these. blocks, first,
    count: int64 [R, L], of latents: block, position of its first token, and how many it holds of
    the ``per_block`` that it could. longest: tokens of the request that has most. whole: these are
    all requests of the step.
    """

    tokens: torch.Tensor
    seen: torch.Tensor
    raw: torch.Tensor
    blocks: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    per_block: int
    longest: int
    whole: bool

    @cached_property
    def positions(self) -> torch.Tensor:
        """Of each token of the latent blocks, int64 [R, longest]; 0 where there is none."""
        positions = (self.first[..., None] + self._at).flatten(1)[:, : self.longest]
        return positions.where(self.hidden == 0, 0)

    @cached_property
    def hidden(self) -> torch.Tensor:
        """0 for each token of the latent blocks, -inf where there is none: [R, longest]."""
        hidden = torch.where(self._at < self.count[..., None], 0.0, -torch.inf)
        return hidden.flatten(1)[:, : self.longest]

    @property
    def _at(self) -> torch.Tensor:
        return torch.arange(self.per_block, device=self.first.device)


def plan_reading(
    layout: LatentLayout,
    held: LatentBlocks,
    table: torch.Tensor,
    view: torch.Tensor,
    seq_lens: torch.Tensor,
    step: Step,
) -> Reading | None:
    """The reading of a step; None where no request has latents.

    held: the requests' latent blocks. table: int [R, C], physical block of each column. view,
    seq_lens: the raw blocks and tokens of each request.
    """
    old = held.tokens.sum(1)
    rows = (old > 0).nonzero().flatten()
    if not len(rows):
        return None
    column, first, count = (field[rows] for field in held)
    q = step.q[rows][:, None]
    # Padding repeats the last query, so that it may be written twice.
    query = torch.minimum(torch.arange(int(q.max())), q - 1)
    device = table.device
    rows_there = rows.to(device)
    lengths = seq_lens[rows_there, None].long()
    seen = lengths - (q - 1 - query).to(device)
    # Of the host's numbers, so that a GPU need not be waited for.
    most = -(-int((step.c + step.q - old)[rows].max()) // layout.block_size)
    return Reading(
        tokens=(step.starts[rows][:, None] + query).to(device),
        seen=seen,
        raw=view[rows_there, :most].long(),
        blocks=table[rows_there[:, None], column.to(device)].long(),
        first=first.to(device),
        count=count.to(device),
        per_block=layout.tokens,
        longest=int(old.max()),
        whole=len(rows) == int((step.q > 0).sum()),
    )


class Packing(NamedTuple):
    """What a step turns into latents: of S requests, raw blocks int64 [S, C], the last ones
    repeated, and the position of the first token, int64 [S].

    destination: int64 [M], a block that takes unit ``slot`` [M] of it from unit ``source`` of row
    ``row``. fresh: int64 [F], those that hold no latents yet. tallies: what metrics count.
    """

    blocks: torch.Tensor
    first: torch.Tensor
    destination: torch.Tensor
    slot: torch.Tensor
    row: torch.Tensor
    source: torch.Tensor
    fresh: torch.Tensor
    tallies: list[Tally]


def plan_packing(
    layout: LatentLayout, unit: int, table: torch.Tensor, step: Step
) -> Packing | None:
    """What a step has to pack; None for nothing, as in most steps.

    unit: tokens that are written at once. table: int [R, C], physical block of each column.
    """
    start, prompt, before = layout.spans(step.n, step.c, step.opted_out)
    after = layout.spans(step.n, step.c + step.q, step.opted_out).old
    rows = (after > before).nonzero().flatten()
    if not len(rows):
        return None
    is_prompt = (step.c < step.n)[rows]
    start, prompt, before, after = (x[rows] for x in (start, prompt, before, after))
    columns = torch.arange(int((after - before).max()) // layout.block_size)
    columns = torch.minimum(
        (start + before)[:, None] // layout.block_size + columns,
        (start + after)[:, None] // layout.block_size - 1,
    )
    row, source = runs((after - before) // unit)
    at = before[row] + source * unit
    destination = layout.column(at // layout.tokens, start[row], prompt[row])
    held, needed = layout.blocks(before), layout.blocks(after)
    of, index = runs(needed - held)
    fresh = layout.column(held[of] + index, start[of], prompt[of])

    def there(index: torch.Tensor) -> torch.Tensor:
        return index.to(table.device, non_blocking=True)

    return Packing(
        blocks=table[there(rows)[:, None], there(columns)].long(),
        first=there(start + before),
        destination=table[there(rows[row]), there(destination)].long(),
        slot=there(at % layout.tokens // unit),
        row=there(row),
        source=there(source),
        fresh=table[there(rows[of]), there(fresh)].long(),
        tallies=[
            Tally(
                kind,
                int(some.sum()),
                int((after - before)[some].sum()),
                int((needed - held)[some].sum()) * layout.block_size,
            )
            for kind, some in (("prompt", is_prompt), ("window", ~is_prompt))
            if bool(some.any())
        ],
    )


def fresh_blocks(layout: LatentLayout, step: Step, table: torch.Tensor) -> torch.Tensor | None:
    """Blocks, int64, that a step begins to fill and does not finish; None if there are none.

    What they hold before may be somebody's latents: as keys and values these bytes can be NaN, and
    a kernel that multiplies what lies behind the last token with zero would spread it.

    table: int [R, C], physical block of each column.
    """
    end = step.c + step.q
    last = (end - 1).div(layout.block_size, rounding_mode="floor")
    begun = (end % layout.block_size > 0) & (step.q > 0) & (last * layout.block_size >= step.c)
    rows = (begun & (step.n > 0)).nonzero().flatten()
    if not len(rows):
        return None
    return table[rows.to(table.device), last[rows].to(table.device)].long()
