# SPDX-License-Identifier: Apache-2.0
"""Latents in the blocks of one layer: written when tokens have aged, read by attention."""

from collections.abc import Sequence

import torch

from kv_policies.compaction import Pages
from kv_policies.latents.attention import Decoder, Latents, Raw, attend
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.packing import Packing
from kv_policies.latents.reading import Reading
from kv_policies.latents.rope import Rope
from kv_policies.workspace import LIMIT


class LatentCache:
    """Packs and reads the latents of one layer.

    Args:
        cache: What a layer holds, [blocks, elements], a block in one piece.
        form: How latents lie in a block.
        keys: Encodes and decodes keys before RoPE.
        values: Encodes and decodes values.
        rope: The rotation of keys.
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

    @property
    def _features(self) -> int:
        """KV heads times head size."""
        return len(self._encoders[0][0])

    @property
    def _block_size(self) -> int:
        return self.cache.shape[1] // (2 * self._features)

    def warm_up(self, heads: int) -> None:
        """Compile what attention needs, before requests come; heads: query heads of the layer."""

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero blocks, int64 [M]."""
        self.cache[blocks] = 0

    def pack(self, packings: Sequence[Packing], pages: Pages) -> None:
        """Turn raw tokens of a step into latents."""
        for packing in packings:
            pieces, columns = packing.blocks.shape
            each = columns * self._block_size * self.packing_bytes(self.form, self._features)
            most = max(1, LIMIT // 2 // each)
            # All are encoded before any is written: blocks that take latents held raw tokens.
            parts = [
                self._encoded(packing, slice(first, first + most), pages)
                for first in range(0, pieces, most)
            ]
            content = [
                torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)
            ]
            self.clear(packing.fresh)  # as latents what they hold can be NaN
            self.form.write(self.cache, packing.destination, packing.slot, content)

    def _encoded(self, packing: Packing, some: slice, pages: Pages) -> tuple[torch.Tensor, ...]:
        """Some pieces as ``LatentFormat.encode`` returns them."""
        blocks, latents = packing.blocks[some], []
        for side, (encode, mean) in enumerate(self._encoders):
            read = pages.values if side else pages.keys
            x = read(blocks).transpose(1, 2).flatten(0, 1).float()
            if not side:
                positions = packing.first[some, None] + torch.arange(
                    len(x) // len(blocks), device=x.device
                )
                x = self.rope.unrotate(x, positions.flatten().clamp(max=len(self.rope.table) - 1))
            latent = (x.flatten(1) - mean) @ encode
            latents.append(latent.unflatten(0, (-1, self.form.unit)))
        keys, values = latents
        return self.form.encode(keys, values, self.cache.dtype)

    def attend(
        self,
        reading: Reading,
        pages: Pages,
        query: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Attention of the requests that have latents.

        Args:
            reading: The requests, and what they read.
            pages: Raw blocks of the layer.
            query: After RoPE, [tokens, Hq, D].
            scale: Factor on q.k in the softmax.
            output: As ``query``; the rows of the requests' tokens are written.
        """
        # What is read is what ``attend_bytes`` counts.
        tokens = reading.blocks.shape[1] * self.form.tokens
        tokens += reading.raw.shape[1] * self._block_size
        _, heads, size = query.shape
        room = LIMIT - self.attend_fixed(self.form, heads)

        def needed(queries: int) -> int:
            return self.attend_bytes(self.form, self._features, size, tokens, heads * queries)

        # Requests first: each pass over queries of a request reads all of its latents.
        queries = reading.tokens.shape[1]
        most = max(1, room // needed(queries))
        if needed(queries) > room:
            each = needed(2) - needed(1)
            queries = max(1, min(queries, 1 + (room - needed(1)) // each))
        for part in reading.parts(most, queries):
            self._attend(part, pages, query, scale, output)

    @staticmethod
    def attend_fixed(form: LatentFormat, heads: int) -> int:
        """Memory that ``attend`` takes whatever the number of requests.

        Args:
            form: How latents lie in a block.
            heads: Query heads.
        """
        return 0

    @staticmethod
    def packing_bytes(form: LatentFormat, features: int) -> int:
        """Memory that ``pack`` takes per token, beside what it writes.

        Keys are read, converted, unrotated in four copies and centered; latents are in float32.
        """
        return 32 * features + 12 * (form.key_rank + form.value_rank)

    @staticmethod
    def attend_bytes(
        form: LatentFormat, features: int, size: int, tokens: int, queries: int
    ) -> int:
        """Memory that ``attend`` takes for one request.

        Args:
            form: How latents lie in a block.
            features: KV heads times channels of a head.
            size: Channels of a head.
            tokens: Latents and raw tokens that the request has.
            queries: Its query tokens, times query heads.
        """
        ranks = form.key_rank + form.value_rank
        of_queries = queries * (4 * features + 16 * size)
        return tokens * (16 * ranks + 16 * queries + 16) + of_queries + (1 << 22)

    @classmethod
    def peak(cls, form: LatentFormat, features: int, size: int, tokens: int, queries: int) -> int:
        """The most memory that a step takes on one layer.

        Args:
            form: How latents lie in a block.
            features: KV heads times channels of a head.
            size: Channels of a head.
            tokens: Of the longest request that may come.
            queries: Query heads. Where there are many query tokens, they are cut to fit.
        """
        encoded = 2 * -(-form.bytes(4) // form.tokens)
        piece = features * cls.packing_bytes(form, features)  # a piece is never that many tokens
        return max(
            LIMIT + tokens * encoded + piece,
            LIMIT
            + cls.attend_fixed(form, queries)
            + cls.attend_bytes(form, features, size, tokens, queries),
        )

    def _attend(
        self,
        reading: Reading,
        pages: Pages,
        query: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        rows = len(reading.raw)
        keys, values = (
            x.reshape(rows, -1, x.shape[-1])[:, : reading.contents.longest]
            for x in self.form.read(self.cache, reading.blocks.flatten())
        )
        out = attend(
            query[reading.tokens].transpose(1, 2),
            Latents(keys, values, reading.contents.positions, reading.contents.hidden),
            Raw(pages.keys(reading.raw), pages.values(reading.raw), reading.seen),
            self.keys,
            self.values,
            self.rope,
            scale,
        )
        output[reading.tokens.flatten()] = out.transpose(1, 2).flatten(0, 1)
