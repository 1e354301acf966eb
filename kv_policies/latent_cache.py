# SPDX-License-Identifier: Apache-2.0
"""Latents in the blocks of one layer: written when a segment ends, read by attention."""

from dataclasses import dataclass
from functools import cached_property

import torch

from kv_policies.compaction import Content, Pages, Segments, Work
from kv_policies.latent_attention import Decoder, Latents, Raw, attend
from kv_policies.latent_layout import latent_blocks, raw_columns
from kv_policies.latents import LatentFormat
from kv_policies.layout import Layout
from kv_policies.low_rank import Factor
from kv_policies.rope import Rope
from kv_policies.step import Step


@dataclass(frozen=True)
class Reading:
    """What attention reads for the R requests of a step that have latents.

    tokens: int64 [R, Q], each query among the step's tokens, padded with a request's last one.
    seen: int64 [R, Q], raw tokens that it sees. raw: int64 [R, C], blocks of these. blocks, first,
    count: int64 [R, L], of latents: block, position of its first token, and how many it holds of
    the ``per_block`` that it could.
    """

    tokens: torch.Tensor
    seen: torch.Tensor
    raw: torch.Tensor
    blocks: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    per_block: int

    @cached_property
    def positions(self) -> torch.Tensor:
        """Of each token of the latent blocks, int64 [R, L * per_block]; 0 where there is none."""
        positions = (self.first[..., None] + self._at).flatten(1)
        return positions.where(self.hidden == 0, 0)

    @cached_property
    def hidden(self) -> torch.Tensor:
        """0 for each token of the latent blocks, -inf where there is none: [R, L * per_block]."""
        return torch.where(self._at < self.count[..., None], 0.0, -torch.inf).flatten(1)

    @property
    def _at(self) -> torch.Tensor:
        return torch.arange(self.per_block, device=self.first.device)


def plan_reading(
    layout: Layout,
    tokens: int,
    table: torch.Tensor,
    view: torch.Tensor,
    seq_lens: torch.Tensor,
    step: Step,
) -> Reading | None:
    """The reading of a step; None where no request has latents.

    tokens: per latent block. table: int [R, C], physical block of each column. view, seq_lens: the
    raw blocks and tokens of each request.
    """
    held = latent_blocks(layout, step.n, step.c, tokens, step.opted_out)
    rows = (held.tokens.sum(1) > 0).nonzero().flatten()
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
    hidden = raw_columns(layout, step.n, step.c, 1, step.opted_out)[1]
    most = -(-int((step.c + step.q - hidden)[rows].max()) // layout.block_size)
    return Reading(
        tokens=(step.starts[rows][:, None] + query).to(device),
        seen=seen,
        raw=view[rows_there, :most].long(),
        blocks=table[rows_there[:, None], column.to(device)].long(),
        first=first.to(device),
        count=count.to(device),
        per_block=tokens,
    )


def fresh_blocks(layout: Layout, step: Step, table: torch.Tensor) -> torch.Tensor | None:
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


class LatentCache:
    """Packs and reads the latents of one layer.

    cache: [blocks, elements], what a layer holds, a block in one piece.
    """

    def __init__(
        self,
        cache: torch.Tensor,
        form: LatentFormat,
        keys: Factor,
        values: Factor,
        rope: Rope,
    ) -> None:
        self.cache, self.form, self.rope = cache, form, rope
        self._encoders = [
            (factor.encode.float().to(cache.device), factor.mean.float().to(cache.device))
            for factor in (keys, values)
        ]
        self.keys, self.values = (
            Decoder(torch.cat((factor.decode, factor.mean[None])).float().to(cache.device))
            for factor in (keys, values)
        )

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero blocks, int64 [M]."""
        self.cache[blocks] = 0

    def compact(self, work: Work, pages: Pages) -> None:
        """Turn the segments of a step into latents, in their destinations."""
        for segments in (work.prompts, work.windows):
            if segments is not None:
                self._pack(segments, pages.read(segments.blocks))

    def _pack(self, segments: Segments, content: Content) -> None:
        keys, values = (x.transpose(1, 2).float() for x in (content.keys(), content.values()))
        rows, length = keys.shape[:2]
        positions = segments.first[:, None] + torch.arange(length, device=keys.device)
        # Behind a segment's end may be anything: its last token stands in, also for quantisation.
        last = (segments.lengths - 1)[:, None]
        blocks = segments.most // (length // segments.blocks.shape[1])
        at = torch.arange(blocks * self.form.tokens, device=keys.device)
        source = torch.minimum(at, last)
        keys = self.rope.unrotate(keys.flatten(0, 1), positions.flatten().clamp(max=self._limit))
        latents = []
        for x, (encode, mean) in zip((keys, values), self._encoders, strict=True):
            latent = (x.reshape(rows, length, -1) - mean) @ encode
            latent = latent.gather(1, source[..., None].expand(-1, -1, latent.shape[-1]))
            latent = latent.unflatten(1, (blocks, -1))
            latents.append(latent[segments.source_row, segments.source_block])
        self.form.write(self.cache, segments.destination, *latents)

    @property
    def _limit(self) -> int:
        return len(self.rope.table) - 1

    def attend(
        self,
        reading: Reading,
        pages: Pages,
        query: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Attention of the requests in ``reading``: query [tokens, Hq, D] to their rows of output,
        of the same shape."""
        rows = len(reading.raw)
        keys, values = (
            x.reshape(rows, -1, x.shape[-1])
            for x in self.form.read(self.cache, reading.blocks.flatten())
        )
        content = pages.read(reading.raw)
        out = attend(
            query[reading.tokens].transpose(1, 2),
            Latents(keys, values, reading.positions, reading.hidden),
            Raw(content.keys(), content.values(), reading.seen),
            self.keys,
            self.values,
            self.rope,
            scale,
        )
        output[reading.tokens.flatten()] = out.transpose(1, 2).flatten(0, 1)
