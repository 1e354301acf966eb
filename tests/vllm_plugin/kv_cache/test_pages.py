# SPDX-License-Identifier: Apache-2.0
"""Blocks of vLLM's CPU cache, written by its own operation and read back in plain order."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_plugin.kv_cache.pages import PackedCache, Pages

BLOCKS = 6


class Cache:
    """A layer's cache as the CPU backend holds it: [blocks, heads, block_size, 2 * head_size]."""

    def __init__(
        self, heads: int, block: int, size: int, dtype: torch.dtype, kind: str = "auto"
    ) -> None:
        stored = torch.uint8 if kind == "fp8" else dtype
        self.raw = torch.zeros(BLOCKS, heads, block, 2 * size, dtype=stored)
        self.isa, self.kind = _get_attn_isa(dtype, block, size, kind), kind
        self.shape, self.dtype = (heads, block, size), dtype

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        heads, block, size = self.shape
        keys, values = self.raw.view(BLOCKS, heads, 2 * block, size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key.to(self.dtype),
            value.to(self.dtype),
            keys,
            values,
            slots,
            self.isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.kind,
        )

    def pages(self) -> Pages:
        return Pages.of(self.raw, *self.shape, self.write)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "block", "size"), [(3, 32, 64), (1, 64, 128), (8, 32, 32), (2, 16, 80), (2, 128, 96)]
)
def test_reads_and_writes_what_the_kernel_does(
    heads: int, block: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cache, other = Cache(heads, block, size, dtype), Cache(heads, block, size, dtype)
    tokens = BLOCKS * block
    key, value = torch.randn(2, tokens, heads, size).to(dtype)
    cache.write(key, value, torch.arange(tokens))
    before = cache.raw.clone()
    pages = cache.pages()
    assert torch.equal(cache.raw, before)  # the probe leaves no trace

    blocks = torch.tensor([[4, 1], [0, 3]])
    want = key.view(BLOCKS, block, heads, size).transpose(1, 2)
    assert torch.equal(pages.keys(blocks), want[blocks].transpose(1, 2).flatten(2, 3))
    want_v = value.view(BLOCKS, block, heads, size).transpose(1, 2)
    assert torch.equal(pages.values(blocks), want_v[blocks].transpose(1, 2).flatten(2, 3))
    last = slice(heads - 1, heads)
    assert torch.equal(pages.keys(blocks, last), pages.keys(blocks)[:, last])

    copy = other.pages()
    for some in (slice(0, 1), slice(1, heads)):
        copy.write_keys(torch.arange(BLOCKS), want[:, some], some)
        copy.write_values(torch.arange(BLOCKS), want_v[:, some], some)
    assert torch.equal(other.raw, cache.raw)


@pytest.mark.parametrize("between", [0, 3])
def test_heads_may_lie_within_tokens(between: int) -> None:
    """As vLLM lays a cache out on a GPU, where layers may also lie between a layer's blocks."""
    heads, block, size = 3, 16, 40
    raw = torch.zeros(BLOCKS, 1 + between, block, heads, 2 * size)
    cache = raw[:, between].transpose(1, 2)

    def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        for slot, *both in zip(slots.tolist(), key, value, strict=True):
            cache[slot // block, :, slot % block] = torch.cat(both, -1)

    key, value = torch.randn(2, BLOCKS * block, heads, size)
    write(key, value, torch.arange(BLOCKS * block))
    pages = Pages.of(cache, heads, block, size, write)
    blocks = torch.tensor([[4, 1]])
    tokens = torch.tensor([[4], [1]]) * block + torch.arange(block)
    assert torch.equal(pages.keys(blocks)[0], key[tokens.flatten()].transpose(0, 1))
    assert torch.equal(pages.values(blocks)[0], value[tokens.flatten()].transpose(0, 1))

    before = raw.clone()
    pages.write_keys(torch.tensor([2]), torch.ones(1, heads, block, size))
    pages.write_values(torch.tensor([2]), torch.zeros(1, heads, block, size))
    assert cache[2, ..., :size].eq(1).all() and cache[2, ..., size:].eq(0).all()
    before[2, between] = raw[2, between]
    assert torch.equal(raw, before)


def test_quantized_caches_are_refused() -> None:
    try:
        cache = Cache(2, 32, 64, torch.bfloat16, "fp8")
    except NotImplementedError as error:
        pytest.skip(str(error))  # vLLM has none on this processor
    with pytest.raises(PackedCache):
        cache.pages()
