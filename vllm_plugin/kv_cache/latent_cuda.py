# SPDX-License-Identifier: Apache-2.0
"""Latents read and written by Triton kernels."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from compress_common.errors import CompressError
from kv_policies.latents.attention import Decoder
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packing
from kv_policies.latents.reading import Reading
from kv_policies.workspace import LIMIT
from vllm_plugin.kv_cache.latent_kernels import FRONT
from vllm_plugin.kv_cache.latent_pack import encode, place, places, read_centered
from vllm_plugin.kv_cache.latent_triton import (
    Context,
    Latents,
    latent_decode,
    resident,
    shared_bytes,
    tiles_for,
    turns,
)


class TritonLatentCache(LatentCache):
    """``LatentCache`` whose attention rebuilds keys on chip.

    cache: the layer's, [blocks, Hkv, block_size, 2 * D], as vLLM's FlashAttention and Triton
        attention take it.
    """

    def __init__(self, blocks: torch.Tensor, *latents: Any, cache: torch.Tensor) -> None:
        super().__init__(blocks, *latents)
        self._raw_keys, self._raw_values = cache.transpose(1, 2).chunk(2, dim=-1)
        heads, size = self._raw_keys.shape[2:]
        if not self.rope.neox or self.rope.table.shape[1] != size:
            raise CompressError(
                "the CUDA kernel of cskv turns all of a head in halves, as Llama does; this model "
                "turns a part of it or pairs of neighbours; choose another policy"
            )
        # Products are in the type of the cache, for the tensor cores.
        keys, values = (Decoder(side.affine.to(blocks)) for side in (self.keys, self.values))
        form, itemsize = self.form, blocks.element_size()
        tiles = tiles_for(
            form.key_rank, form.bits, heads, size, itemsize, shared_bytes(blocks.device)
        )
        self._latents = Latents(
            blocks.view(torch.uint8),
            form.tokens,
            form.bits,
            keys.decode,
            keys.mean,
            values.decode,
            values.mean,
            self.rope.table,
            turns(self.rope.table, tiles.tokens, form.bits, blocks.dtype),
            tiles,
        )

        self._places = places(form, blocks.dtype).to(blocks.device)

    def warm_up(self, heads: int) -> None:
        """Compile the kernels, by a request without tokens, and by packing the null block into
        itself; heads: query heads of the layer.
        """
        size, device = self._raw_keys.shape[-1], self.cache.device
        query = torch.zeros(1, heads, size, dtype=self.cache.dtype, device=device)
        none = torch.zeros(1, dtype=torch.int32, device=device)
        context = Context(none, none, none, none[:, None], none[:, None], none, none)
        self._decode(query, context, size**-0.5, query)
        columns = math.lcm(self._block_size, self.form.unit) // self._block_size
        units = columns * self._block_size // self.form.unit
        null, before = torch.zeros(units, dtype=torch.int64, device=device), self.cache[0].clone()
        blocks = null.new_zeros(1, columns)
        self.pack([Packing(blocks, null[:1], null, null, null[:0])], None)
        self.cache[0] = before

    def pack(self, packings: Sequence[Packing], pages: Any) -> None:
        numbers = self.form.bytes(self.cache.element_size()) // self.cache.element_size()
        numbers = numbers * self.form.unit // self.form.tokens
        for packing in packings:
            pieces, columns = packing.blocks.shape
            each = columns * self._block_size
            most = LIMIT // 2 // (each * self.packing_bytes(self.form, self._features))
            most = max(8, most // 8 * 8)  # parts of tensors begin where wide loads can
            units = each // self.form.unit
            # All are encoded before any is placed: blocks that take latents held raw tokens.
            staged = self.cache.new_empty(pieces * units, numbers)
            for first in range(0, pieces, most):
                some = slice(first, first + most)
                self._encode(packing, some, staged[first * units : (first + most) * units])
            self.clear(packing.fresh)  # as latents what they hold can be NaN
            place(self.cache, staged, packing.destination, packing.slot, self._places)

    def _encode(self, packing: Packing, some: slice, staged: torch.Tensor) -> None:
        """Some pieces as units of latents, to ``staged``."""
        means = tuple(mean for _, mean in self._encoders)
        raw = self._raw_keys, self._raw_values
        centered = read_centered(
            packing.blocks[some], packing.first[some], raw, means, self.rope.table
        )
        keys, values = (
            side @ encoder for side, (encoder, _) in zip(centered, self._encoders, strict=True)
        )
        encode(keys, values, self.form.bits, staged)

    @staticmethod
    def packing_bytes(form: LatentFormat, features: int) -> int:
        """Centered keys and values, and their latents, in float32."""
        return 8 * features + 4 * (form.key_rank + form.value_rank)

    def _attend(
        self, reading: Reading, pages: Any, query: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        self._decode(query, Context(**reading.narrow), scale, output)

    def _decode(
        self, query: torch.Tensor, context: Context, scale: float, output: torch.Tensor
    ) -> None:
        latent_decode(
            query, context, self._latents, self._raw_keys, self._raw_values, scale, output
        )

    @staticmethod
    def attend_bytes(
        form: LatentFormat, features: int, size: int, tokens: int, queries: int
    ) -> int:
        """Logits of latents, padded, and a sum of value latents."""
        return queries * (4 * (tokens + 128) + _sum_bytes(form))

    @staticmethod
    def attend_fixed(form: LatentFormat, heads: int) -> int:
        """Sums of more splits: a context is split only to fill the device."""
        return resident(_device()) * heads * _sum_bytes(form)


def _sum_bytes(form: LatentFormat) -> int:
    return 4 * (FRONT + form.value_rank + 16)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
