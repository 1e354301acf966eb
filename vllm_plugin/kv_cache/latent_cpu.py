# SPDX-License-Identifier: Apache-2.0
"""Latents read by the kernel of ``latent_cpu.cpp``."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from kv_policies.latents.attention import Decoder
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.reading import Reading
from kv_policies.latents.rope import Rope
from vllm_plugin.kv_cache.pages import Pages

LANES = 16  # floats of a vector, of the source; a tile is two of these


class CPULatentCache(LatentCache):
    """``LatentCache`` whose attention rebuilds keys a tile at a time, in L1.

    Limits: bfloat16 caches only. Decoders of keys are rounded to bfloat16 too; products are summed
    in float32.

    Args:
        pages: Of the layer; their ``blocks`` are the cache.
        latents: As for ``LatentCache``, without the cache.
        kernel: See ``latent_cpu_build.load``.
    """

    def __init__(self, pages: Pages, *latents: Any, kernel: Any) -> None:
        super().__init__(pages.blocks, *latents)
        size = pages.shape[2]
        self._kernel, self._key_decode = kernel, key_decode(self.keys, self.rope, size)
        self._order, self._angles = self.rope.halves(size), angles(self.rope)
        of_keys, of_values = pages.places().int()
        self._places = torch.stack((of_keys[..., self._order], of_values))

    def _attend(
        self, reading: Reading, pages: Any, query: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        self._kernel.decode(
            query,
            reading.tokens,
            reading.seen,
            reading.raw,
            self.cache,
            self._places,
            reading.blocks,
            reading.contents.first,
            reading.contents.count,
            self.form.tokens,
            self.form.key_rank,
            self.form.bits,
            self._key_decode,
            self.values.affine,
            self._order,
            self._angles,
            scale,
            output,
        )

    @staticmethod
    def attend_bytes(
        form: LatentFormat, features: int, size: int, tokens: int, queries: int
    ) -> int:
        """Queries in float32, and a partial sum for each block of latents."""
        blocks = 1 + tokens // form.tokens
        return 4 * queries * (size + blocks * (form.value_rank + 3))


def key_decode(decoder: Decoder, rope: Rope, size: int) -> torch.Tensor:
    """A decoder of keys, for heads of ``size``, as the kernel takes it: bfloat16 [F, even].

    The mean, larger than most latents, is there twice: rounded, and what that took from it.
    """
    mean = decoder.mean.bfloat16()
    rows = [*decoder.decode.bfloat16(), mean, (decoder.mean - mean.float()).bfloat16()]
    if len(rows) % 2:
        rows.append(torch.zeros_like(mean))
    by_head = torch.stack(rows, 1).unflatten(0, (-1, size))
    return by_head[:, rope.halves(size)].flatten(0, 1).contiguous()


@lru_cache(maxsize=8)  # layers share a rotation, and its table may be large
def angles(rope: Rope) -> torch.Tensor:
    """The table as the kernel takes it: what a vector of positions needs is in one piece.

    float32 [positions / LANES, rotary_dim, LANES], and a tile behind the last position.
    """
    table = F.pad(rope.table.float(), (0, 0, 0, -len(rope.table) % LANES + LANES))
    return table.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
