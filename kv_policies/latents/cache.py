# SPDX-License-Identifier: Apache-2.0
"""Latents in the blocks of one layer: written when tokens have aged, read by attention."""

import torch

from kv_policies.compaction import Pages
from kv_policies.latents.attention import Decoder, Latents, Raw, attend
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.plan import Packing, Reading
from kv_policies.latents.rope import Rope


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

    def pack(self, packing: Packing, pages: Pages) -> None:
        """Turn raw tokens of a step into latents."""
        content = pages.read(packing.blocks)
        keys, values = (x.transpose(1, 2).float() for x in (content.keys(), content.values()))
        rows, length = keys.shape[:2]
        positions = packing.first[:, None] + torch.arange(length, device=keys.device)
        keys = self.rope.unrotate(keys.flatten(0, 1), positions.flatten().clamp(max=self._limit))
        latents = []
        for x, (encode, mean) in zip((keys, values), self._encoders, strict=True):
            latent = (x.reshape(rows, length, -1) - mean) @ encode
            units = latent.unflatten(1, (-1, self.form.unit))
            latents.append(units[packing.row, packing.source])
        self.clear(packing.fresh)  # they were raw, and as latents these bytes can be NaN
        self.form.write(self.cache, packing.destination, packing.slot, *latents)

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
            x.reshape(rows, -1, x.shape[-1])[:, : reading.longest]
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
