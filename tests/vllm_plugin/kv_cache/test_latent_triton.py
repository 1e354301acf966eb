# SPDX-License-Identifier: Apache-2.0
"""Decode attention over latents against float64 arithmetic, and packing against the reference.

The kernels run on the GPU where there is one, else in Triton's interpreter. Triton has to know that
before it is imported, so this file then runs itself in a process of its own.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.packing import Packing
from kv_policies.latents.rope import Rope

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BLOCKS, POSITIONS = 80, 800


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="already in a process that can run it")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Case:
    """Random requests; ``latents`` and ``raw`` are what the cache's bytes mean, in float64.

    old: latents of each request. queries: (request, raw tokens seen). tiles: others than those of
    an H100. Bytes that nothing may depend on are 0xFF: NaN in every float type.
    """

    heads: int
    group: int
    size: int
    ranks: tuple[int, int]
    dtype: torch.dtype
    bits: int
    tokens: int
    block: int
    old: list[int]
    queries: list[tuple[int, int]]
    tiles: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    latents: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads, size, (rk, rv) = self.heads, self.size, self.ranks
        requests, width = len(self.old), heads * size
        # Heads before tokens and V beside K, as vLLM's caches: strides that are not plain.
        numbers = 2 * self.block * width
        room = max(numbers * self.dtype.itemsize, 4 * self.tokens * sum(self.ranks))
        cache = torch.full((BLOCKS, room), 255, dtype=torch.uint8)
        both = cache.view(self.dtype)[:, :numbers].view(BLOCKS, heads, self.block, 2 * size)
        both = both.transpose(1, 2)
        free = iter(torch.randperm(BLOCKS).tolist())

        columns = max(1, -(-max(self.old) // self.tokens))
        table = torch.zeros(requests, columns, dtype=torch.int32)
        for request, length in enumerate(self.old):
            for column in range(-(-length // self.tokens)):
                table[request, column] = block = next(free)
                count = min(self.tokens, length - column * self.tokens)
                self.latents[block] = self._write(cache[block], count)

        longest = [max(seen for row, seen in self.queries if row == at) for at in range(requests)]
        raw_table = torch.zeros(requests, max(longest) // self.block + 1, dtype=torch.int32)
        for request, length in enumerate(longest):
            for column in range(-(-length // self.block)):
                block, rest = next(free), min(self.block, length - column * self.block)
                raw_table[request, column] = block
                both[block, :rest] = torch.randn(rest, heads, 2 * size).to(self.dtype)

        angle = torch.outer(torch.arange(POSITIONS), 100 ** -(torch.arange(size // 2) * 2 / size))
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        product = self.dtype
        if INTERPRETED and product == torch.bfloat16:
            product = torch.float32
        rows, raw_lens = torch.tensor(self.queries, dtype=torch.int32).T.contiguous()
        # Queries of other requests stand between these.
        at = torch.arange(len(rows), dtype=torch.int32) * 2 + 1
        self.arguments = {
            "query": torch.randn(2 * len(rows), heads * self.group, size).to(self.dtype),
            "tokens": at,
            "row": rows,
            "raw_lens": raw_lens,
            "raw_table": raw_table,
            "table": table,
            "lengths": torch.tensor(self.old, dtype=torch.int32),
            "starts": torch.arange(requests, dtype=torch.int32) * 37,
            "key_cache": both[..., :size],
            "value_cache": both[..., size:],
            "blocks": cache,
            "key_decode": torch.randn(rk, width).div_(rk**0.5).to(product),
            "key_mean": torch.randn(width).to(self.dtype),
            "value_decode": torch.randn(rv, width).div_(rv**0.5).to(product),
            "value_mean": torch.randn(width).to(self.dtype),
            "cos_sin": torch.cat([angle.cos(), angle.sin()], 1),
        }

    def _write(self, block: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill one block, uint8 [bytes]; the latents it then holds, [count, rk] and [count, rv]."""
        tokens, rk = self.tokens, self.ranks[0]
        seen = torch.arange(tokens)[:, None] < count
        if self.bits == 16:
            whole = [torch.randn(tokens, rank).to(self.dtype) for rank in self.ranks]
            parts = [latent.where(seen, torch.nan) for latent in whole]
        else:
            groups = tokens // 32
            codes = [torch.randint(16, (tokens, rank), dtype=torch.uint8) for rank in self.ranks]
            key = torch.randn(2, groups, 1, rk).mul_(0.2).half()
            value = torch.randn(2, tokens, 1).mul_(0.2).half()
            keys = codes[0].view(groups, 32, rk).double() * key[0] + key[1]
            whole = [keys.flatten(0, 1), codes[1].double() * value[0] + value[1]]
            by_group = [code.view(groups, 2, 16, -1) for code in codes]
            packed = [code[:, 0] + 16 * code[:, 1] for code in by_group]
            key = key.where(seen[::32, None], torch.nan)
            parts = [*packed, key, value.where(seen, torch.nan)]
        content = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
        block[: len(content)] = content
        return whole[0][:count].double(), whole[1][:count].double()

    def run(self, splits: int | None = None, **changes: Any) -> torch.Tensor:
        from vllm_plugin.kv_cache.latent_triton import (
            Context,
            Latents,
            latent_decode,
            shared_bytes,
            tiles_for,
            turns,
        )

        given = {name: value.to(DEVICE) for name, value in (self.arguments | changes).items()}
        itemsize, shared = given["key_decode"].element_size(), shared_bytes(given["query"].device)
        tiles = tiles_for(self.ranks[0], self.bits, self.heads, self.size, itemsize, shared)
        tiles = tiles._replace(**self.tiles)
        of_tile = turns(given["cos_sin"], tiles.tokens, self.bits, given["key_decode"].dtype)
        given |= {"bits": self.bits, "block_tokens": self.tokens, "turns": of_tile, "tiles": tiles}
        context = Context(**{name: given[name] for name in Context._fields})
        given["tokens"] = self.tokens
        latents = Latents(**{name: given[name] for name in Latents._fields})
        out = torch.full_like(given["query"], torch.nan)
        raw = given["key_cache"], given["value_cache"]
        latent_decode(given["query"], context, latents, *raw, self.size**-0.5, out, splits)
        others = torch.ones(len(out), dtype=torch.bool, device=DEVICE)
        others[context.tokens] = False
        assert bool(out[others].isnan().all())
        return out[context.tokens].double().cpu()

    def expected(self) -> torch.Tensor:
        """The same in float64, one query token after the other."""
        given = SimpleNamespace(**self.arguments)
        out = []
        for query, (request, length) in zip(
            given.query[given.tokens].double(), self.queries, strict=True
        ):
            keys, values = [], []
            at = int(given.starts[request])
            for block in given.table[request, : -(-self.old[request] // self.tokens)].tolist():
                ck, cv = self.latents[block]
                key = given.key_mean.double() + ck @ given.key_decode.double()
                value = given.value_mean.double() + cv @ given.value_decode.double()
                cos_sin = given.cos_sin[at : at + len(ck)]
                keys.append(rotated(key.view(-1, self.heads, self.size), cos_sin))
                values.append(value.view(-1, self.heads, self.size))
                at += len(ck)
            blocks = given.raw_table[request]
            keys.append(given.key_cache[blocks].flatten(0, 1)[:length].double())
            values.append(given.value_cache[blocks].flatten(0, 1)[:length].double())
            key, value = (torch.cat(x).repeat_interleave(self.group, 1) for x in (keys, values))
            weights = torch.einsum("hd,thd->ht", query, key * self.size**-0.5).softmax(-1)
            out.append(torch.einsum("ht,thd->hd", weights, value))
        return torch.stack(out)


def rotated(keys: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """NeoX's RoPE of [T, H, D] by cos_sin [T, D]."""
    cos, sin = cos_sin.double().chunk(2, dim=1)
    first, second = keys.chunk(2, dim=2)
    turned = torch.cat([-second, first], 2)
    return keys * cos.repeat(1, 2)[:, None] + turned * sin.repeat(1, 2)[:, None]


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STREAMED = {"resident": False, "heads": 1, "keys": 32, "tokens": 64}
# heads, group, size, ranks, type, bits, latents of a block, tokens of a raw block, tiles
SHAPES = {
    "two heads a program": (2, 3, 64, (38, 22), F16, 16, 48, 16, {}),
    "an odd number of heads": (3, 1, 16, (5, 7), F16, 16, 64, 32, {}),
    "a rank in seven parts": (1, 2, 32, (208, 38), F16, 16, 32, 16, {}),
    "decoders read per tile": (2, 2, 32, (70, 20), F32, 16, 48, 64, STREAMED),
    "ranks too high to keep": (1, 2, 32, (260, 530), F16, 16, 48, 16, {}),
    "4 bits": (2, 2, 64, (38, 70), F16, 4, 96, 64, {}),
    "4 bits, decoders read per tile": (1, 1, 32, (70, 20), F32, 4, 160, 32, STREAMED),
    "4 bits, bfloat16": (1, 2, 64, (38, 20), BF16, 4, 32, 16, {}),
    "bfloat16": (2, 4, 64, (38, 38), BF16, 16, 32, 16, {}),
    "heads of 96": (2, 1, 96, (20, 20), F32, 16, 32, 16, {}),
    "more query heads than 16 rows": (1, 17, 16, (16, 16), F32, 16, 16, 16, {}),
}
TOLERANCE = {F32: 1e-5, F16: 4e-3, BF16: 2e-2}


def case(shape: tuple) -> Case:
    """Two query tokens of one request, and requests that lack latents, raw tokens or both."""
    *shape, tiles = shape
    tokens = shape[6]
    old = [2 * tokens + 9, 0, tokens, 0]
    queries = [(0, 69), (0, 70), (1, 20), (2, 0), (3, 0)]
    return Case(*shape, old, queries, tiles)


class TestKernels:
    __test__ = INTERPRETED or DEVICE == "cuda"  # else test_in_the_interpreter runs it

    @pytest.mark.parametrize(
        ("name", "splits"),
        [*((name, None) for name in SHAPES), ("two heads a program", 3), ("4 bits, bfloat16", 3)],
    )
    def test_as_in_float64(self, name: str, splits: int | None) -> None:
        given = case(SHAPES[name])
        want = given.expected()
        assert bool((want[-1] == 0).all())  # a request without tokens
        close = TOLERANCE[given.dtype]
        torch.testing.assert_close(given.run(splits), want, atol=close, rtol=close)

    def test_full_rank_is_plain_attention(self) -> None:
        heads, size, tokens = 2, 32, 16
        rank = heads * size
        case = Case(
            heads, 2, size, (rank, rank), F32, 16, tokens, 16, [2 * tokens], [(0, 20), (0, 21)]
        )
        basis = torch.linalg.qr(torch.randn(rank, rank))[0]
        total = 2 * tokens + 21
        keys, values = torch.randn(2, total, rank, dtype=torch.float64)
        given = SimpleNamespace(**case.arguments)
        given.key_decode.copy_(basis), given.value_decode.copy_(basis)
        cos_sin = given.cos_sin[:total]
        turned = rotated(keys.view(total, heads, size), cos_sin)
        for at, block in enumerate(given.table[0].tolist()):
            own = slice(at * tokens, (at + 1) * tokens)
            ck = (keys[own] - given.key_mean) @ basis.T.double()
            cv = (values[own] - given.value_mean) @ basis.T.double()
            content = torch.cat([ck, cv]).float().view(torch.uint8).flatten()
            given.blocks[block, : len(content)] = content
        for at, block in enumerate(given.raw_table[0].tolist()):
            own = slice(2 * tokens + at * case.block, 2 * tokens + (at + 1) * case.block)
            count = len(turned[own])
            given.key_cache[block, :count] = turned[own]
            given.value_cache[block, :count] = values.view(total, heads, size)[own]
        want = torch.nn.functional.scaled_dot_product_attention(
            given.query[given.tokens].double().transpose(0, 1),
            turned.transpose(0, 1),
            values.view(total, heads, size).transpose(0, 1),
            attn_mask=torch.arange(total) < torch.tensor([[total - 1], [total]]),
            enable_gqa=True,
        ).transpose(0, 1)
        torch.testing.assert_close(case.run(2), want, atol=2e-5, rtol=2e-5)

    def test_tables_without_columns(self) -> None:
        shape = 1, 1, 16, (5, 7), F32, 16, 16, 16
        raw = Case(*shape, [0], [(0, 20)])
        empty = torch.zeros(1, 0, dtype=torch.int32)
        torch.testing.assert_close(raw.run(table=empty), raw.expected(), atol=1e-5, rtol=1e-5)
        old = Case(*shape, [19], [(0, 0)])
        torch.testing.assert_close(old.run(raw_table=empty), old.expected(), atol=1e-5, rtol=1e-5)


class TestPacking:
    __test__ = INTERPRETED or DEVICE == "cuda"

    @pytest.mark.parametrize(
        ("bits", "ranks", "dtype", "block"),
        [
            (16, (5, 20), F16, 16),
            (16, (16, 9), F32, 32),
            (4, (7, 70), F16, 32),
            (4, (66, 1), BF16, 64),
        ],
    )
    def test_same_bytes_as_the_reference(
        self, bits: int, ranks: tuple[int, int], dtype: torch.dtype, block: int
    ) -> None:
        """Three pieces into two blocks, one of which held raw tokens that become latents."""
        from vllm_plugin.kv_cache.latent_cuda import TritonLatentCache

        torch.manual_seed(0)
        heads, size, unit = 2, 32, 32 if bits == 4 else 16
        features, piece = heads * size, max(block, 32)
        factors = [
            Factor(torch.randn(features, rank), torch.randn(rank, features), torch.randn(features))
            for rank in ranks
        ]
        # The third piece ends at the last position of the table.
        angle = torch.outer(torch.arange(3 * piece), 100 ** -(torch.arange(size // 2) * 2 / size))
        rope = Rope(torch.cat([angle.cos(), angle.sin()], 1).to(DEVICE))
        raw = torch.randn(12, heads, block, 2 * size).to(dtype).to(DEVICE)
        form = LatentFormat(*ranks, bits, 2 * piece)
        elements = raw[0].numel()
        assert form.bytes(dtype.itemsize) <= elements * dtype.itemsize

        class Raw:
            """The cache as vLLM's, as ``Pages`` reads it."""

            def __init__(self, cache: torch.Tensor) -> None:
                self.cache = cache

            def keys(self, blocks: torch.Tensor) -> torch.Tensor:
                return self.cache[blocks].transpose(1, 2).flatten(2, 3)[..., :size]

            def values(self, blocks: torch.Tensor) -> torch.Tensor:
                return self.cache[blocks].transpose(1, 2).flatten(2, 3)[..., size:]

        columns = piece // block
        blocks = torch.randperm(12)[: 3 * columns].view(3, columns)
        at = torch.arange(3 * piece // unit) * unit
        into = torch.tensor([int(blocks[0, 0]), int(blocks[2, 0])])
        packing = Packing(
            blocks, torch.arange(3) * piece, into[at // form.tokens], at % form.tokens // unit, into
        )
        packing = Packing(*(part.to(DEVICE) for part in packing))
        found = []
        for fused in (False, True):
            cache = raw.clone()
            flat = cache.view(12, -1)
            if fused:
                latents = TritonLatentCache(flat, form, *factors, rope, cache=cache)
                latents.warm_up(2 * heads)
                assert bool((cache == raw).all())
            else:
                latents = LatentCache(flat, form, *factors, rope)
            latents.pack([packing], Raw(cache))
            found.append(flat.view(torch.uint8))
        same = (found[0] == found[1]).double().mean()
        # Products of a GPU round otherwise where their shapes differ.
        assert float(same) == 1.0 if INTERPRETED else float(same) > 0.99
