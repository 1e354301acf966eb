# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel against the same attention in torch, and what becomes of it without a compiler."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from kv_policies.latents.cache import LatentCache
from kv_policies.latents.columns import Contents
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.reading import Reading
from kv_policies.latents.rope import Rope
from tests.kv_policies.latents.test_rope import table
from vllm_plugin.kv_cache import latent_cpu_build
from vllm_plugin.kv_cache.latent_cpu import CPULatentCache
from vllm_plugin.kv_cache.pages import Order, Pages

HEADS, GROUP, SIZE, BLOCK, BLOCKS = 2, 3, 32, 32, 24
FEATURES = HEADS * SIZE

needs_avx512 = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="the kernel needs AVX-512"
)


def pages() -> Pages:
    """Heads, then channels before tokens for keys: an order that is not plain."""
    plain = torch.arange(2 * HEADS * BLOCK * SIZE).view(2, HEADS, BLOCK, SIZE)
    keys = plain[0].view(HEADS, SIZE, BLOCK).mT
    content = torch.full((BLOCKS, plain.numel()), torch.nan).bfloat16()
    orders = (Order.of(side.flatten(1), content.dtype) for side in (keys, plain[1]))
    return Pages(content, *orders, (HEADS, BLOCK, SIZE))


def factor(rank: int) -> Factor:
    """Rounded already but for the mean, so that both ways have the same numbers."""
    decode = torch.randn(rank, FEATURES).div_(rank**0.5).bfloat16().float()
    return Factor(torch.zeros(FEATURES, rank), decode, torch.randn(FEATURES) * 3)


@needs_avx512
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("neox", "turned"), [(True, 32), (True, 20), (False, 32), (False, 20)])
@pytest.mark.parametrize(
    ("ranks", "tokens", "bits"),
    [((25, 51), 48, 16), ((8, 6), 96, 16), ((1, 1), 160, 16), ((33, 20), 64, 4)],
)
def test_it_is_attention(
    ranks: tuple[int, int], tokens: int, bits: Literal[4, 16], neox: bool, turned: int, queries: int
) -> None:
    torch.manual_seed(0)
    memory, rope = pages(), Rope(table(700, turned), neox)
    form = LatentFormat(*ranks, bits, tokens)
    free = torch.randperm(BLOCKS)
    blocks, raw = free[:6].view(2, 3), free[6:10].view(2, 2)
    # The second request has a block less of latents and of raw tokens. Behind the last raw ones
    # there is NaN; blocks of latents begin as zeros.
    blocks[1, 2] = blocks[1, 0]
    memory.blocks[blocks] = 0
    count = torch.tensor([[tokens, tokens, form.unit], [tokens, tokens - form.unit, 0]])
    first = torch.tensor([[0, tokens, 2 * tokens], [64, 64 + tokens, 0]])
    for block, held in zip(blocks.flatten(), count.flatten().tolist(), strict=True):
        units = torch.arange(held // form.unit)
        shape = len(units), form.unit
        latents = (torch.randn(*shape, rank) for rank in ranks)
        content = form.encode(*latents, memory.blocks.dtype)
        form.write(memory.blocks, block.expand(len(units)), units, content)
    seen = torch.tensor([[40, 41, 42][-queries:], [5, 6, 7][-queries:]])
    for row, held in zip(raw, seen.amax(1).tolist(), strict=True):
        for token in range(held):
            at = memory.places()[:, :, token % BLOCK]
            memory.blocks[row[token // BLOCK], at] = torch.randn(at.shape).bfloat16()
    reading = Reading(
        tokens=torch.arange(2 * queries).view(2, queries),
        seen=seen,
        raw=raw,
        blocks=blocks,
        contents=Contents(first, count, tokens, 2 * tokens + form.unit),
        whole=True,
    )
    factors = factor(ranks[0]), factor(ranks[1])
    reference = LatentCache(memory.blocks, form, *factors, rope)
    kernel = CPULatentCache(memory, form, *factors, rope, kernel=latent_cpu_build.load())
    # As a slice of what is projected to queries, keys and values.
    query = torch.randn(2 * queries, HEADS * GROUP + 4, SIZE).bfloat16()[:, : HEADS * GROUP]
    found = []
    for cache in (reference, kernel):
        output = torch.full((2 * queries, HEADS * GROUP, SIZE), torch.nan).bfloat16()
        cache.attend(reading, memory, query, SIZE**-0.5, output)
        found.append(output)
    torch.testing.assert_close(*found, atol=1e-2, rtol=8e-3)  # one step of bfloat16


def test_other_types_are_left_to_torch() -> None:
    assert "the cache is float32" in str(latent_cpu_build.why_not(torch.float32))


@pytest.mark.slow
@needs_avx512
def test_it_compiles_once(tmp_path: Path) -> None:
    def why_not(compiler: str) -> str:
        program = (
            "import torch; from vllm_plugin.kv_cache.latent_cpu_build import why_not;"
            "print('found:', why_not(torch.bfloat16))"
        )
        environment = os.environ | {"CXX": compiler, "VLLM_COMPRESS_CACHE": str(tmp_path)}
        command = [sys.executable, "-c", program]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return told.stdout.partition("found: ")[2].strip()

    assert "install g++" in why_not("/no/compiler")
    assert why_not("c++") == "None"
    [library] = tmp_path.glob("kernel/*/latent_cpu.so")
    assert why_not("/no/compiler") == "None", "what is compiled is not compiled again"
    assert list(tmp_path.glob("kernel/*/*.so")) == [library]


@pytest.mark.slow
def test_it_compiles(tmp_path: Path) -> None:
    """For the processors that it needs, on any other of their architecture."""
    if platform.machine() != "x86_64" or shutil.which("c++") is None:
        pytest.skip("needs a compiler for x86-64")
    latent_cpu_build._LIBRARY._build(tmp_path / "latent_cpu.so")
    assert (tmp_path / "latent_cpu.so").stat().st_size > 10_000
