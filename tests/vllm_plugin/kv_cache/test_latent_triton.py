# SPDX-License-Identifier: Apache-2.0
"""Decode attention over latents against float64 arithmetic, and whether it compiles for CUDA.

The kernel runs on the GPU where there is one, else in Triton's interpreter. Triton has to know that
before it is imported, so this file then runs itself in a process of its own.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BLOCK, BLOCKS, POSITIONS = 16, 40, 800


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="already in a process that can run it")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Case:
    """Random requests; ``latents`` and ``raw`` are what the cache's bytes mean, in float64.

    counts: tokens in each latent block of each request. queries: (request, raw tokens seen).
    Bytes that nothing may depend on are 0xFF: NaN in every float type.
    """

    heads: int
    group: int
    size: int
    ranks: tuple[int, int]
    tokens: int
    bits: int
    dtype: torch.dtype
    counts: list[list[int]]
    queries: list[tuple[int, int]]
    arguments: dict[str, Any] = field(default_factory=dict)
    latents: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads, size, (rk, rv) = self.heads, self.size, self.ranks
        requests, width = len(self.counts), heads * size
        # Heads before tokens and V beside K, as vLLM's CPU cache: strides that are not plain.
        bytes_ = 2 * BLOCK * width * self.dtype.itemsize
        cache = torch.full((BLOCKS, bytes_), 255, dtype=torch.uint8)
        both = cache.view(self.dtype).view(BLOCKS, heads, BLOCK, 2 * size).transpose(1, 2)
        free = iter(torch.randperm(BLOCKS).tolist())

        columns = max(1, max(map(len, self.counts)))
        table, counts, first = torch.zeros(3, requests, columns, dtype=torch.int32)
        for request, held in enumerate(self.counts):
            for column, count in enumerate(held):
                block = next(free)
                table[request, column], counts[request, column] = block, count
                # Blocks of a request need not follow each other.
                first[request, column] = column * (self.tokens + 37) + request
                self.latents[block] = self._write(cache[block], count)

        longest = [max(seen for row, seen in self.queries if row == at) for at in range(requests)]
        raw_table = torch.zeros(requests, max(longest) // BLOCK + 1, dtype=torch.int32)
        for request, length in enumerate(longest):
            for column in range(-(-length // BLOCK)):
                block, rest = next(free), min(BLOCK, length - column * BLOCK)
                raw_table[request, column] = block
                both[block, :rest] = torch.randn(rest, heads, 2 * size).to(self.dtype)

        angle = torch.outer(torch.arange(POSITIONS), 100 ** -(torch.arange(size // 2) * 2 / size))
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        product = self.dtype
        if INTERPRETED and product == torch.bfloat16:
            product = torch.float32
        rows, raw_lens = torch.tensor(self.queries, dtype=torch.int32).T
        self.arguments = {
            "query": torch.randn(len(rows), heads * self.group, size).to(self.dtype),
            "row": rows.contiguous(),
            "raw_table": raw_table,
            "raw_lens": raw_lens.contiguous(),
            "key_cache": both[..., :size],
            "value_cache": both[..., size:],
            "cache_bytes": cache,
            "latent_table": table,
            "latent_counts": counts,
            "latent_first": first,
            "key_decode": torch.randn(rk, width).div_(rk**0.5).to(product),
            "key_mean": torch.randn(width).to(self.dtype),
            "value_decode": torch.randn(rv, width).div_(rv**0.5).to(product),
            "value_mean": torch.randn(width).to(self.dtype),
            "cos_sin": torch.cat([angle.cos(), angle.sin()], 1),
            "scale": size**-0.5,
            "tokens": self.tokens,
            "bits": self.bits,
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

    def run(self, splits: int | None, **changes: Any) -> torch.Tensor:
        from vllm_plugin.kv_cache.latent_triton import latent_decode

        arguments = self.arguments | changes
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(DEVICE)
        out = torch.full_like(arguments["query"], torch.nan)
        latent_decode(**arguments, out=out, splits=splits)
        return out.double().cpu()

    def expected(self) -> torch.Tensor:
        """The same in float64, one query token after the other."""
        given = SimpleNamespace(**self.arguments)
        out = []
        tables = torch.stack([given.latent_table, given.latent_counts, given.latent_first], 2)
        for query, (request, length) in zip(given.query.double(), self.queries, strict=True):
            keys, values = [], []
            for block, count, first in tables[request].tolist():
                if count:
                    ck, cv = self.latents[block]
                    key = given.key_mean.double() + ck @ given.key_decode.double()
                    value = given.value_mean.double() + cv @ given.value_decode.double()
                    at = torch.arange(first, first + count)
                    keys.append(rotated(key.view(-1, self.heads, self.size), given.cos_sin[at]))
                    values.append(value.view(-1, self.heads, self.size))
            blocks = given.raw_table[request]
            keys.append(given.key_cache[blocks].flatten(0, 1)[:length].double())
            values.append(given.value_cache[blocks].flatten(0, 1)[:length].double())
            key, value = (torch.cat(x).repeat_interleave(self.group, 1) for x in (keys, values))
            weights = torch.einsum("hd,thd->ht", query, key * given.scale).softmax(-1)
            out.append(torch.einsum("ht,thd->hd", weights, value))
        return torch.stack(out)


def rotated(keys: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """NeoX's RoPE of [T, H, D] by cos_sin [T, D]."""
    cos, sin = cos_sin.double().chunk(2, dim=1)
    first, second = keys.chunk(2, dim=2)
    turned = torch.cat([-second, first], 2)
    return keys * cos.repeat(1, 2)[:, None] + turned * sin.repeat(1, 2)[:, None]


def batch(tokens: int) -> dict[str, Any]:
    """Three query tokens of one request, and requests that lack latents, raw tokens or both."""
    return {
        "tokens": tokens,
        "counts": [[tokens, 9, tokens - 1], [], [5], [tokens] * 3, []],
        "queries": [(0, 33), (0, 34), (0, 35), (1, 20), (2, 0), (3, 70), (4, 0)],
    }


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = {
    "gqa": (2, 3, 64, (38, 22), F32, 16, 48),
    "mha, 4 bits": (2, 1, 128, (38, 70), F32, 4, 96),
    "gqa, bfloat16": (2, 4, 64, (38, 38), BF16, 16, 32),
    "gqa, bfloat16, 4 bits": (1, 2, 64, (38, 20), BF16, 4, 32),
    "gqa, float16": (2, 2, 128, (64, 38), F16, 16, 80),
    "small heads": (3, 1, 16, (5, 7), F32, 16, 64),
    "a decoder too large to stay on chip": (2, 2, 128, (130, 20), F32, 16, 48),
    "that at 4 bits": (2, 2, 128, (130, 20), F32, 4, 96),
    "more query heads than a tile's 16 rows": (1, 17, 16, (16, 16), F32, 16, 16),
}
TOLERANCE = {F32: 1e-5, F16: 4e-3, BF16: 2e-2}


class TestKernel:
    __test__ = INTERPRETED or DEVICE == "cuda"  # else test_in_the_interpreter runs it

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_as_in_float64(self, shape: tuple) -> None:
        heads, group, size, ranks, dtype, bits, tokens = shape
        case = Case(heads, group, size, ranks, dtype=dtype, bits=bits, **batch(tokens))
        want = case.expected()
        assert bool((want[-1] == 0).all())  # a request without tokens
        for splits in (None, 4):  # None is 1 on a CPU
            got = case.run(splits)
            torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    def test_full_rank_is_plain_attention(self) -> None:
        heads, size, tokens = 2, 32, 16
        rank = heads * size
        case = Case(
            heads, 2, size, (rank, rank), tokens, 16, F32, [[tokens, tokens]], [(0, 20), (0, 21)]
        )
        basis = torch.linalg.qr(torch.randn(rank, rank))[0]
        total = 2 * tokens + 21
        keys, values = torch.randn(2, total, rank, dtype=torch.float64)
        given = SimpleNamespace(**case.arguments)
        given.latent_first[0] = torch.tensor([0, tokens])
        given.key_decode.copy_(basis), given.value_decode.copy_(basis)
        cos_sin = given.cos_sin[:total]
        turned = rotated(keys.view(total, heads, size), cos_sin)
        for at, block in enumerate(given.latent_table[0].tolist()):
            own = slice(at * tokens, (at + 1) * tokens)
            ck = (keys[own] - given.key_mean) @ basis.T.double()
            cv = (values[own] - given.value_mean) @ basis.T.double()
            content = torch.cat([ck, cv]).float().view(torch.uint8).flatten()
            given.cache_bytes[block, : len(content)] = content
        for at, block in enumerate(given.raw_table[0].tolist()):
            own = slice(2 * tokens + at * BLOCK, 2 * tokens + (at + 1) * BLOCK)
            count = len(turned[own])
            given.key_cache[block, :count] = turned[own]
            given.value_cache[block, :count] = values.view(total, heads, size)[own]
        want = torch.nn.functional.scaled_dot_product_attention(
            given.query.double().transpose(0, 1),
            turned.transpose(0, 1),
            values.view(total, heads, size).transpose(0, 1),
            attn_mask=torch.arange(total) < torch.tensor([[total - 1], [total]]),
            enable_gqa=True,
        ).transpose(0, 1)
        torch.testing.assert_close(case.run(2), want, atol=2e-5, rtol=2e-5)

    def test_tables_without_columns(self) -> None:
        shape = {"heads": 1, "group": 1, "size": 16, "ranks": (5, 7), "bits": 16, "dtype": F32}
        raw = Case(**shape, tokens=16, counts=[[]], queries=[(0, 20)])
        empty = torch.zeros(1, 0, dtype=torch.int32)
        none = dict.fromkeys(("latent_table", "latent_counts", "latent_first"), empty)
        torch.testing.assert_close(raw.run(None, **none), raw.expected(), atol=1e-5, rtol=1e-5)
        old = Case(**shape, tokens=16, counts=[[16, 3]], queries=[(0, 0)])
        torch.testing.assert_close(
            old.run(None, raw_table=empty), old.expected(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"tokens": 24}, {"tokens": 16, "bits": 4}, {"tokens": 1024}]
)
def test_impossible_blocks_are_refused(changes: dict[str, int]) -> None:
    case = Case(1, 1, 16, (5, 7), dtype=F32, bits=16, **batch(32))
    with pytest.raises(ValueError, match="bits"):
        case.run(1, **changes)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("capability", "shared"), [(80, 163), (90, 227)])
def test_compiles_for_cuda(
    capability: int, shared: int, bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to machine code, in the shared memory that a block of the device can have, in KiB."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Driver:
        def get_current_device(self) -> int:
            return 1000 + capability  # Triton remembers a device's target

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    kernels = []
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # A model with F = 1024 at a fifth of its width.
    tokens = 64 if bits == 16 else 224
    case = Case(8, 4, 128, (208, 208), dtype=BF16, bits=bits, **batch(tokens))
    case.run(None)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= shared * 1024
