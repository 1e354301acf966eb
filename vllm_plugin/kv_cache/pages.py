# SPDX-License-Identifier: Apache-2.0
"""K and V of one layer's paged cache, by block and in plain order, whatever the kernel's layout."""

from collections.abc import Callable

import torch

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class PackedCache(ValueError):
    """A KV cache whose blocks are not plain keys and values in some order."""


class Pages:
    """Blocks of one layer as [blocks, Hkv, block_size, D], read and written bit for bit.

    Attention kernels keep keys and values in orders of their own (AMX and AVX interleave them).
    Rather than to know each, ``of`` writes numbered tokens through vLLM's own operation and looks
    where they went: ``places``, int64 [2 * Hkv * block_size * D], K before V.
    """

    def __init__(self, blocks: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...]) -> None:
        self._blocks, self._shape = blocks, shape
        self._key_places, self._value_places = places.chunk(2)
        self._order = torch.empty_like(places)
        self._order[places] = torch.arange(len(places), device=places.device)

    @classmethod
    def of(
        cls, cache: torch.Tensor, heads: int, block_size: int, head_size: int, write: Write
    ) -> "Pages":
        """Probe a cache whose first dimension is blocks.

        write: ``write(key, value, slots)`` with key and value [tokens, heads, head_size], as the
        backend's ``do_kv_cache_update``. Block 0, vLLM's null block, is used and restored.

        Raises PackedCache, for instance for quantised caches.
        """
        block = cache[0]
        if not block.is_contiguous():
            raise PackedCache("a block of this KV cache is not one piece of memory")
        shape = heads, block_size, head_size
        places = _places(block, shape, write)
        blocks = cache.as_strided((len(cache), block.numel()), (cache.stride(0), 1))
        return cls(blocks, places, shape)

    def keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of blocks, int64 [...] to [..., Hkv, block_size, D], a copy."""
        return self._read(blocks, self._key_places)

    def values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Values of blocks, as ``keys``."""
        return self._read(blocks, self._value_places)

    def _read(self, blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        raw = self._blocks.index_select(0, blocks.flatten())
        return raw.gather(1, places.expand(len(raw), -1)).view(*blocks.shape, *self._shape)

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite whole blocks, int64 [M], with K and V [M, Hkv, block_size, D]."""
        content = torch.cat([keys.flatten(1), values.flatten(1)], dim=1)
        self._blocks[blocks] = content.gather(1, self._order.expand(len(content), -1))


def _places(block: torch.Tensor, shape: tuple[int, int, int], write: Write) -> torch.Tensor:
    """Where the kernel puts each element of K, then of V, within a block.

    Elements are numbered from 1 and written one digit of base 128 after the other, as small whole
    numbers survive any floating-point type.
    """
    heads, tokens, size = shape
    count = 2 * heads * tokens * size
    numbers = torch.arange(1, count + 1, device=block.device).view(2, heads, tokens, size)
    slots = torch.arange(tokens, device=block.device)
    before, found = block.clone(), torch.zeros(block.numel(), dtype=torch.int64)
    try:
        for shift in range(0, count.bit_length(), 7):
            key, value = (numbers >> shift & 127).to(block.dtype).transpose(2, 1).contiguous()
            write(key, value, slots)
            found += block.flatten().cpu().double().round().long() << shift
    finally:
        block.copy_(before)
    if not torch.equal(found.sort().values, torch.arange(1, count + 1)):
        raise PackedCache("this KV cache does not hold plain keys and values")
    places = torch.empty(count, dtype=torch.int64)
    places[found - 1] = torch.arange(count)
    return places.to(block.device)
