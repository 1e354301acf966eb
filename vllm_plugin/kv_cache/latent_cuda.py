# SPDX-License-Identifier: Apache-2.0
"""Latents read by the Triton kernel."""

from typing import Any

import torch

from compress_common.errors import CompressError
from kv_policies.latents.attention import Decoder
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.reading import Reading
from vllm_plugin.kv_cache.latent_triton import latent_decode, resident


class TritonLatentCache(LatentCache):
    """``LatentCache`` whose attention rebuilds keys on chip.

    cache: the layer's, [blocks, Hkv, block_size, 2 * D], as vLLM's Triton attention takes it.
    """

    def __init__(self, blocks: torch.Tensor, *latents: Any, cache: torch.Tensor) -> None:
        super().__init__(blocks, *latents)
        self._raw_keys, self._raw_values = cache.transpose(1, 2).chunk(2, dim=-1)
        if not self.rope.neox or self.rope.table.shape[1] != self._raw_keys.shape[-1]:
            raise CompressError(
                "the CUDA kernel of cskv turns all of a head in halves, as Llama does; this model "
                "turns a part of it or pairs of neighbours; choose another policy"
            )
        self._bytes = blocks.view(torch.uint8)
        # Products are in the type of the cache, for the tensor cores.
        self._decoders = [Decoder(side.affine.to(blocks)) for side in (self.keys, self.values)]

    def _attend(
        self, reading: Reading, pages: Any, query: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        index, narrow = reading.tokens.flatten(), reading.narrow
        wanted = query[index]
        out = torch.empty_like(wanted)
        keys, values = self._decoders
        latent_decode(
            wanted,
            narrow["row"],
            narrow["raw"],
            narrow["seen"],
            self._raw_keys,
            self._raw_values,
            self._bytes,
            narrow["blocks"],
            narrow["count"],
            narrow["first"],
            keys.decode,
            keys.mean,
            values.decode,
            values.mean,
            self.rope.table,
            scale,
            tokens=self.form.tokens,
            bits=self.form.bits,
            out=out,
        )
        output[index] = out

    @staticmethod
    def attend_bytes(
        form: LatentFormat, features: int, size: int, tokens: int, queries: int
    ) -> int:
        """One partial sum per query and head, the query, and the result."""
        return queries * (_partial_bytes(form, size) + 8 * size)

    @staticmethod
    def attend_fixed(form: LatentFormat, size: int, group: int) -> int:
        """The partial sums of splits: a context is split only to fill the device."""
        return resident(_device()) * group * _partial_bytes(form, size)


def _partial_bytes(form: LatentFormat, size: int) -> int:
    return 4 * (size + form.value_rank + 8)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
