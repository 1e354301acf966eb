# SPDX-License-Identifier: Apache-2.0
"""K and V of one layer's paged cache, by block and in plain order, whatever the kernel's layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class PackedCache(ValueError):
    """A KV cache whose blocks are not plain keys and values in a regular order."""


class Pages:
    """Blocks of one layer as [blocks, Hkv, block_size, D], read and written bit for bit.

    Attention kernels keep keys and values in orders of their own (AMX and AVX interleave them).
    Rather than to know each, ``of`` writes numbered tokens through vLLM's own operation, looks
    where they went, and describes that by strides.
    """

    def __init__(
        self, blocks: torch.Tensor, keys: "Order", values: "Order", shape: tuple[int, ...]
    ) -> None:
        self.blocks = blocks  # [blocks, elements], each in one piece
        self._keys, self._values = keys, values
        self.shape = shape  # KV heads, tokens of a block, head size

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
        # In the order of memory: heads or tokens may come first, as the engine's layout has it.
        block = block.permute(sorted(range(block.ndim), key=block.stride, reverse=True))
        if not block.is_contiguous():
            raise PackedCache("a block of this KV cache is not one piece of memory")
        shape = heads, block_size, head_size
        keys, values = (Order.of(places, cache.dtype) for places in _places(block, shape, write))
        blocks = cache.as_strided((len(cache), block.numel()), (cache.stride(0), 1))
        return cls(blocks, keys, values, shape)

    @classmethod
    def of_layer(cls, layer: Any, heads: int, block_size: int, head_size: int) -> "Pages":
        """Probe the cache of an attention layer, through its own backend."""
        write = partial(_write, layer)
        return cls.of(layer.kv_cache, heads, block_size, head_size, write)

    def places(self) -> torch.Tensor:
        """Of each element in a block: int64 [K and V, Hkv, block_size, D]."""
        sides = (order.places(self.blocks.dtype) for order in (self._keys, self._values))
        return torch.stack([side.view(self.shape) for side in sides])

    def read(self, blocks: torch.Tensor) -> "Content":
        """A copy of blocks, int64 [R, C]."""
        return Content(self, self.blocks.index_select(0, blocks.flatten()), len(blocks))

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite whole blocks, int64 [M], with K and V [M, Hkv, block_size, D]."""
        raw = self.blocks.new_empty(len(blocks), self.blocks.shape[1])
        for order, content in ((self._keys, keys), (self._values, values)):
            view = order.view(raw)
            view.copy_(content.contiguous().view(view.dtype).view(view.shape))
        self.blocks[blocks] = raw


class Content:
    """What ``Pages.read`` has copied, put in plain order when asked for."""

    def __init__(self, pages: Pages, raw: torch.Tensor, rows: int) -> None:
        self._pages, self._raw, self._rows = pages, raw, rows

    def keys(self) -> torch.Tensor:
        """[R, Hkv, C * block_size, D]"""
        return self._plain(self._pages._keys)

    def values(self) -> torch.Tensor:
        """[R, Hkv, C * block_size, D]"""
        return self._plain(self._pages._values)

    def _plain(self, order: "Order") -> torch.Tensor:
        view = order.view(self._raw).unflatten(0, (self._rows, -1)).transpose(1, 2)
        heads, _, size = self._pages.shape
        return view.contiguous().view(self._raw.dtype).view(self._rows, heads, -1, size)


@dataclass(frozen=True)
class Order:
    """Where plain order is in a block: sizes and strides, heads first, in units of ``dtype``.

    ``dtype`` is the widest integer that is moved as a whole: copying pairs is several times faster
    than copying halves.
    """

    dtype: torch.dtype
    first: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, places: torch.Tensor, dtype: torch.dtype) -> "Order":
        """From the place of each element, int64 [Hkv, elements]; PackedCache if no strides visit
        them in order.
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
            units = math.gcd(sizes[-1], 8 // dtype.itemsize, first, step, *strides[:-1])
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
        """Raw blocks [M, elements], contiguous, seen in plain order, [M, *sizes] of ``dtype``."""
        wide = raw.view(self.dtype)
        return wide.as_strided((len(wide), *self.sizes), (wide.shape[1], *self.strides), self.first)


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
    block: torch.Tensor, shape: tuple[int, int, int], write: Write
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the kernel puts each element of K and of V within a block.

    Elements are numbered from 1, K before V, and written one digit of base 128 after the other, as
    small whole numbers survive any floating-point type.
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
    keys, values = places.view(2, heads, -1)
    return keys, values
