# SPDX-License-Identifier: Apache-2.0
"""Blocks of vLLM's CPU cache, written by its own operation and read back in plain order."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kv_policies.compaction import Layer, Observations, compact, workspace
from kv_policies.layout.tokens import TokenLayout
from kv_policies.planner import Planner
from kv_policies.registry import build_policy
from kv_policies.workspace import Heads
from tests.support.layout_sim import step_of
from vllm_plugin.kv_cache.joined import join
from vllm_plugin.kv_cache.pages import PackedCache, Pages
from vllm_plugin.kv_cache.quantized import FP8, Quantized, plain_queries

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


def quantized(kind: str, scales: tuple[float, float], numbers: torch.dtype) -> Quantized:
    return Quantized(FP8[kind], numbers, (torch.tensor(scales[0]), torch.tensor(scales[1])))


def test_reads_and_writes_what_the_kernel_does_in_fp8() -> None:
    try:
        cache = Cache(2, 32, 64, torch.bfloat16, "fp8")
    except NotImplementedError as error:
        pytest.skip(str(error))  # vLLM has none on this processor
    key, value = torch.randn(2, BLOCKS * 32, 2, 64).bfloat16()
    cache.write(key, value, torch.arange(BLOCKS * 32))
    how = quantized("fp8", (1, 1), torch.bfloat16)
    pages = Pages.of(cache.raw, *cache.shape, cache.write, how)
    blocks = torch.arange(BLOCKS)[None]
    numbers = pages.key_numbers(pages.keys(blocks))[0]
    assert torch.equal(numbers, key.to(FP8["fp8"]).to(key).transpose(0, 1))
    with pytest.raises(PackedCache):  # not without being told what the bytes are
        cache.pages()


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("numbers", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.37, 2.5), (0.0123, 0.9)])
def test_fp8_moves_bits_and_scores_numbers(
    kind: str, numbers: torch.dtype, scales: tuple[float, float]
) -> None:
    """Written as vLLM's operation defines it: FP8 of what is divided by the scale."""
    torch.manual_seed(0)
    heads, block, size = 3, 16, 48
    raw = torch.zeros(BLOCKS, block, heads, 2, size, dtype=torch.uint8)

    def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        assert key.dtype == value.dtype == numbers
        for slot, *both in zip(slots.tolist(), key, value, strict=True):
            divided = [x.float() / scale for x, scale in zip(both, scales, strict=True)]
            stored = torch.stack(divided, 1).to(FP8[kind]).view(torch.uint8)
            raw[slot // block, slot % block] = stored

    key, value = (torch.randn(BLOCKS * block, heads, size).to(numbers) for _ in range(2))
    write(key, value, torch.arange(BLOCKS * block))
    before = raw.clone()
    how = quantized(kind, scales, numbers)
    pages = Pages.of(raw, heads, block, size, write, how)
    assert torch.equal(raw, before)

    blocks = torch.tensor([[4, 1]])
    tokens = (blocks.T * block + torch.arange(block)).flatten()
    read = pages.keys(blocks), pages.values(blocks)
    found = pages.key_numbers(read[0]), pages.value_numbers(read[1])
    step = torch.finfo(FP8[kind]).eps  # between neighbors, as a share of them
    for got, want, scale in zip(found, (key, value), scales, strict=True):
        wanted = want[tokens].transpose(0, 1)
        assert got.dtype == numbers and got.shape == (1, heads, 2 * block, size)
        near = step * wanted.float().abs() + 2 * torch.finfo(FP8[kind]).tiny * scale
        assert ((got[0] - wanted).float().abs() <= near).all()
    pages.write_keys(torch.tensor([0, 5]), read[0][0].unflatten(1, (2, block)).transpose(0, 1))
    pages.write_values(torch.tensor([0, 5]), read[1][0].unflatten(1, (2, block)).transpose(0, 1))
    assert torch.equal(raw[[0, 5]], before[[4, 1]])
    assert join([pages, pages]) is None  # scales can differ


@pytest.mark.parametrize("name", ["snap_kv", "prefix_kv", "key_diff"])
def test_tokens_of_an_fp8_cache_are_chosen_by_its_numbers(name: str) -> None:
    """What is left of it means what is left of a plain cache of the same numbers."""
    torch.manual_seed(0)
    heads, block, size, scales = 2, 16, 32, (0.37, 2.5)
    policy = build_policy(name, {"queries": 24} if name == "prefix_kv" else {})
    layout, step = TokenLayout(block, Fraction(1, 4)), step_of((128, 0, 128), (100, 0, 100))
    table = torch.randperm(16).view(2, 8)
    shape = Heads(heads, 2, size, 5, "cpu")
    space = workspace(policy, shape)
    work = Planner([layout], policy, space).work(layout, step, table)
    assert work is not None
    query = torch.randn(228, 2 * heads, size)

    def cache(stored: torch.dtype, how: Quantized | None) -> Pages:
        raw = torch.zeros(16, heads, block, 2 * size, dtype=torch.uint8 if how else stored)

        def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
            both = [x / scale if how else x for x, scale in zip((key, value), scales, strict=True)]
            content = torch.cat(both, -1).to(stored).view(raw.dtype)
            raw[slots // block, :, slots % block] = content

        return Pages.of(raw, heads, block, size, write, how)

    how = quantized("fp8", scales, torch.float32)
    fp8, plain = cache(FP8["fp8"], how), cache(torch.float32, None)
    every = torch.arange(16)
    for write, same in (("write_keys", "keys"), ("write_values", "values")):
        bits = torch.randn(16, heads, block, size).to(FP8["fp8"]).view(torch.uint8)
        getattr(fp8, write)(every, bits)
        getattr(plain, write)(every, getattr(how, same)(bits))
    before = fp8.keys(every[None])
    for pages in (fp8, plain):
        layer = Layer("layer", 0, pages, shape, policy, space, Observations())
        compact(work, layer, query)
    assert not torch.equal(fp8.keys(every[None]), before)
    assert torch.equal(how.keys(fp8.keys(every[None])), plain.keys(every[None]))
    assert torch.equal(how.values(fp8.values(every[None])), plain.values(every[None]))


def test_scales_can_come_later() -> None:
    """vLLM may compute them from the first tokens."""
    how = quantized("fp8", (1, 1), torch.float32)
    stored = torch.ones(1, 1, 4, 8).to(FP8["fp8"]).view(torch.uint8)
    how.scales[0].fill_(3)
    assert how.keys(stored).eq(3).all() and how.values(stored).eq(1).all()


def test_queries_in_fp8_are_observed_as_numbers() -> None:
    layer = SimpleNamespace(_q_scale=torch.tensor(0.5))
    query = torch.tensor([[1.0, -3.0]])
    assert plain_queries(query, layer, torch.bfloat16) is query
    found = plain_queries(query.to(torch.float8_e4m3fn), layer, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.tolist() == [[0.5, -1.5]]
