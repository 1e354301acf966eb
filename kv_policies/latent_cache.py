# SPDX-License-Identifier: Apache-2.0
"""Latents in the blocks of one layer: written when a segment ends, read by attention."""

from dataclasses import dataclass

import torch

from kv_policies.compaction import Content, Pages, Segments, Work
from kv_policies.latent_attention import Decoder, Latents, Raw, attend
from kv_policies.latent_layout import latent_blocks
from kv_policies.latents import LatentFormat
from kv_policies.layout import Layout
from kv_policies.low_rank import Factor
from kv_policies.rope import Rope
from kv_policies.step import Step


@dataclass(frozen=True)
class Reading:
    """What attention reads for the R requests of a step that have latents.

    tokens: int64 [R, Q], each query among the step's tokens, padded with a request's last one.
    seen: int64 [R, Q], raw tokens that it sees. raw: int64 [R, C], blocks of these. blocks: int64
    [R * L], of latents. positions: int64 [R, L * tokens], of their tokens. hidden: float of the
    same shape, -inf where there is none.
    """

    tokens: torch.Tensor
    seen: torch.Tensor
    raw: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor


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
    at = torch.arange(tokens)
    positions = (first[..., None] + at).flatten(1)
    hidden = torch.where(at < count[..., None], 0.0, -torch.inf).flatten(1)
    device = table.device
    rows_there = rows.to(device)
    lengths = seq_lens[rows_there, None].long()
    seen = lengths - (q - 1 - query).to(device)
    most = -(-int((step.c + step.q)[rows].max()) // layout.block_size)
    return Reading(
        tokens=(step.starts[rows][:, None] + query).to(device),
        seen=seen,
        raw=view[rows_there, : min(most, view.shape[1])].long(),
        blocks=table[rows_there[:, None], column.to(device)].long().flatten(),
        positions=torch.where(hidden < 0, 0, positions).to(device),
        hidden=hidden.to(device),
    )


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
        self._cache, self._form, self._rope = cache, form, rope
        self._encoders = [
            (factor.encode.float().to(cache.device), factor.mean.float().to(cache.device))
            for factor in (keys, values)
        ]
        self._keys, self._values = (
            Decoder(factor.decode.float().to(cache.device), factor.mean.float().to(cache.device))
            for factor in (keys, values)
        )

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
        at = torch.arange(blocks * self._form.tokens, device=keys.device)
        source = torch.minimum(at, last)
        keys = self._rope.unrotate(keys.flatten(0, 1), positions.flatten().clamp(max=self._limit))
        latents = []
        for x, (encode, mean) in zip((keys, values), self._encoders, strict=True):
            latent = (x.reshape(rows, length, -1) - mean) @ encode
            latent = latent.gather(1, source[..., None].expand(-1, -1, latent.shape[-1]))
            latent = latent.unflatten(1, (blocks, -1))
            latents.append(latent[segments.source_row, segments.source_block])
        self._form.write(self._cache, segments.destination, *latents)

    @property
    def _limit(self) -> int:
        return len(self._rope.table) - 1

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
            x.reshape(rows, -1, x.shape[-1]) for x in self._form.read(self._cache, reading.blocks)
        )
        content = pages.read(reading.raw)
        out = attend(
            query[reading.tokens].transpose(1, 2),
            Latents(keys, values, reading.positions, reading.hidden),
            Raw(content.keys(), content.values(), reading.seen),
            self._keys,
            self._values,
            self._rope,
            scale,
        )
        output[reading.tokens.flatten()] = out.transpose(1, 2).flatten(0, 1)
