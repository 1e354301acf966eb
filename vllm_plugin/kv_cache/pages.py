# SPDX-License-Identifier: Apache-2.0
"""K and V of one layer's paged cache, by block and in plain order, whatever the kernel's layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kv_policies.compaction import ALL
from vllm_plugin.kv_cache.quantized import Quantized

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class PackedCache(ValueError):
    """A KV cache whose blocks are not plain keys and values in a regular order."""


class Pages:
    """Blocks of one layer as [blocks, Hkv, block_size, D], read and written bit for bit.

    Attention kernels keep keys and values in orders of their own (AMX and AVX interleave them).
    ``of`` does not know these orders. It writes numbered tokens through vLLM's own operation, looks
    where they went, and describes that by strides.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        keys: "Order",
        values: "Order",
        shape: tuple[int, ...],
        quantized: Quantized | None = None,
    ) -> None:
        self.blocks = blocks  # [blocks, elements], each in one piece
        self._keys, self._values = self.orders = keys, values
        self.shape = shape  # KV heads, tokens of a block, head size
        self.quantized = quantized  # what the bits stand for; None: themselves

    @classmethod
    def of(
        cls,
        cache: torch.Tensor,
        heads: int,
        block_size: int,
        head_size: int,
        write: Write,
        quantized: Quantized | None = None,
    ) -> "Pages":
        """Probe a cache. Block 0, vLLM's null block, is used and restored.

        Args:
            cache: A layer's cache, the first dimension being blocks.
            heads: KV heads.
            block_size: Tokens per block.
            head_size: Channels of a head.
            write: ``write(key, value, slots)`` with key and value [tokens, heads, head_size], as
                the backend's ``do_kv_cache_update``.
            quantized: How the cache is quantized; None: it is not.

        Raises:
            PackedCache: For instance for caches with a scale per token.
        """
        block = cache[0]
        # In the order of memory: heads or tokens may come first, as the engine's layout has it.
        block = block.permute(sorted(range(block.ndim), key=block.stride, reverse=True))
        if not block.is_contiguous():
            raise PackedCache("a block of this KV cache is not one piece of memory")
        shape = heads, block_size, head_size
        # Wide integers must also fit where blocks start.
        starts = math.gcd(cache.stride(0), cache.storage_offset())
        keys, values = (
            Order.of(places, cache.dtype, starts)
            for places in _places(block, shape, write, quantized)
        )
        blocks = cache.as_strided((len(cache), block.numel()), (cache.stride(0), 1))
        return cls(blocks, keys, values, shape, quantized)

    @classmethod
    def of_layer(cls, layer: Any, heads: int, block_size: int, head_size: int) -> "Pages":
        """Probe the cache of an attention layer, through its own backend."""
        write = partial(_write, layer)
        quantized = Quantized.of_layer(layer)
        return cls.of(layer.kv_cache, heads, block_size, head_size, write, quantized)

    def places(self) -> torch.Tensor:
        """Of each element in a block: int64 [K and V, Hkv, block_size, D]."""
        sides = (order.places(self.blocks.dtype) for order in (self._keys, self._values))
        return torch.stack([side.view(self.shape) for side in sides])

    def keys(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        """A copy of the keys of blocks.

        Args:
            blocks: int64 [R, C].
            heads: Some of the KV heads.

        Returns:
            [R, heads, C * block_size, D], contiguous.
        """
        return self._read(self._keys, blocks, heads)

    def values(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        """A copy of the values of blocks, as ``keys``."""
        return self._read(self._values, blocks, heads)

    def write_keys(self, blocks: torch.Tensor, keys: torch.Tensor, heads: slice = ALL) -> None:
        """Overwrite the keys of some heads of whole blocks.

        Args:
            blocks: int64 [M].
            keys: [M, heads, block_size, D].
            heads: Some of the KV heads.
        """
        self._write(self._keys, blocks, keys, heads)

    def write_values(self, blocks: torch.Tensor, values: torch.Tensor, heads: slice = ALL) -> None:
        """Overwrite the values of some heads of whole blocks, as ``write_keys``."""
        self._write(self._values, blocks, values, heads)

    def key_numbers(self, keys: torch.Tensor) -> torch.Tensor:
        """What keys as ``keys`` returns them stand for: themselves, unless they are quantized."""
        return keys if self.quantized is None else self.quantized.keys(keys)

    def value_numbers(self, values: torch.Tensor) -> torch.Tensor:
        """What values stand for, as ``key_numbers``."""
        return values if self.quantized is None else self.quantized.values(values)

    def _read(self, order: "Order", blocks: torch.Tensor, heads: slice) -> torch.Tensor:
        view = order.view(self.blocks)[:, heads]
        each = torch.arange(view.shape[1], device=blocks.device)
        content = view.new_empty(len(blocks), len(each), blocks.shape[1], *view.shape[2:])
        # In one copy: indexing alone would keep the cache's order.
        torch.ops.aten.index.Tensor_out(view, [blocks[:, None], each[:, None]], out=content)
        return content.view(self.blocks.dtype).view(len(blocks), len(each), -1, self.shape[2])

    def _write(
        self, order: "Order", blocks: torch.Tensor, content: torch.Tensor, heads: slice
    ) -> None:
        view = order.view(self.blocks)[:, heads]
        view[blocks] = content.contiguous().view(order.dtype).view(len(blocks), *view.shape[1:])


@dataclass(frozen=True)
class Order:
    """Where the elements of a block are found in plain order, heads first.

    Attributes:
        dtype: The widest integer that is moved as a whole. Copying pairs is several times faster
            than copying halves. The other fields count in it.
        first: Place of the first element.
        sizes: Of each dimension.
        strides: Of each dimension.
    """

    dtype: torch.dtype
    first: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, places: torch.Tensor, dtype: torch.dtype, starts: int = 0) -> "Order":
        """The order of K or of V.

        Args:
            places: The place of each element in a block, int64 [Hkv, elements].
            dtype: Of the cache.
            starts: A number that divides the place in memory of every block; 0: all do.

        Raises:
            PackedCache: If no strides visit the elements in order.
        """
        heads, first = len(places), int(places[0, 0])
        step = int(places[-1, 0] - first) // max(1, heads - 1)
        rest = places[0] - first
        if not bool((places - first == torch.arange(heads)[:, None] * step + rest).all()):
            raise PackedCache("the heads of this KV cache are not alike")
        sizes: list[int] = []
        strides: list[int] = []
        while len(rest) > 1:
            run = _run(rest)
            sizes.insert(0, run)
            strides.insert(0, int(rest[1]))
            rest = rest[::run]
        units = 1  # elements that always lie side by side, and where a wide integer may start
        if strides[-1] == 1:
            units = math.gcd(sizes[-1], 8 // dtype.itemsize, first, step, starts, *strides[:-1])
        sizes[-1] //= units
        strides = [stride // units for stride in (step, *strides[:-1])] + [strides[-1]]
        wide = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return cls(wide[units * dtype.itemsize], first // units, (heads, *sizes), tuple(strides))

    def places(self, dtype: torch.dtype) -> torch.Tensor:
        """What ``of`` was given, for elements of this type: int64 [Hkv, elements]."""
        units = self.dtype.itemsize // dtype.itemsize
        last = sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        numbers = torch.arange(self.first + last + 1)
        wide = numbers.as_strided(self.sizes, self.strides, self.first).flatten(1)
        return (wide[..., None] * units + torch.arange(units)).flatten(1)

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """Blocks [M, elements], each in one piece, in plain order: [M, *sizes] of ``dtype``."""
        wide = raw.view(self.dtype)
        first = wide.storage_offset() + self.first
        return wide.as_strided((len(wide), *self.sizes), (wide.stride(0), *self.strides), first)


def _write(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)


def _run(rest: torch.Tensor) -> int:
    """The longest arithmetic run that all of ``rest`` repeats."""
    step = int(rest[1])
    for run in range(len(rest), 1, -1):
        if len(rest) % run == 0:
            rows = rest.view(-1, run)
            if bool((rows - rows[:, :1] == torch.arange(run) * step).all()):
                return run
    raise PackedCache("the order of this KV cache cannot be described by strides")


def _places(
    block: torch.Tensor, shape: tuple[int, int, int], write: Write, quantized: Quantized | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the kernel puts each element of K and of V within a block.

    Elements are numbered from 1, K before V, and written one digit after the other, as small whole
    numbers survive any floating-point type: those below 128 in 16 bits, those below 8 in FP8.
    """
    bits, dtype, stored, scales = 7, block.dtype, block.dtype, (1, 1)
    if quantized is not None:  # the kernel divides what is written by the scale
        bits, dtype, stored = 3, quantized.numbers, quantized.stored
        scales = quantized.scales
    heads, tokens, size = shape
    count = 2 * heads * tokens * size
    numbers = torch.arange(1, count + 1, device=block.device).view(2, heads, tokens, size)
    slots = torch.arange(tokens, device=block.device)
    before, found = block.clone(), torch.zeros(block.numel(), dtype=torch.int64)
    try:
        for shift in range(0, count.bit_length(), bits):
            digits = (numbers >> shift & (1 << bits) - 1).transpose(2, 1).contiguous()
            key, value = (x.mul(by).to(dtype) for x, by in zip(digits, scales, strict=True))
            write(key, value, slots)
            found += block.flatten().cpu().view(stored).double().round().long() << shift
    finally:
        block.copy_(before)
    if not torch.equal(found.sort().values, torch.arange(1, count + 1)):
        raise PackedCache("this KV cache does not hold plain keys and values")
    places = torch.empty(count, dtype=torch.int64)
    places[found - 1] = torch.arange(count)
    keys, values = places.view(2, heads, -1)
    return keys, values
