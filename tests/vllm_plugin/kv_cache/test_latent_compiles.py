# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of latents compiled for GPUs that are not there.

Triton compiles down to machine code with the ptxas of its own wheel. Each kernel has to fit into
the shared memory of its GPU, keep its numbers in registers, and not be compiled again while
requests wait.
"""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.packing import Packing
from kv_policies.latents.rope import Rope

triton = pytest.importorskip("triton", reason="Triton is not installed")
KIB = {80: 163, 89: 99, 90: 227}  # shared memory that a program may have on an A100, L4, H100

# capability, bits, key rank, value rank, head size, KV heads; 4 query heads to a KV head
FAST = [(90, 16, 128, 288, 128, 8), (80, 4, 64, 128, 128, 8)]
SLOW = [
    (90, 16, 208, 200, 128, 8),
    (90, 4, 64, 128, 128, 8),
    (90, 4, 128, 512, 128, 8),
    (90, 4, 208, 640, 128, 8),
    (90, 16, 100, 300, 64, 8),
    (90, 16, 341, 682, 128, 8),
    (80, 16, 64, 256, 128, 8),
    (80, 16, 128, 512, 128, 8),
    (80, 16, 208, 208, 128, 8),
    (80, 4, 128, 256, 128, 8),
    (80, 4, 208, 640, 128, 8),
    (89, 16, 128, 256, 128, 8),
    (89, 4, 128, 256, 256, 4),
]


class Compiled(NamedTuple):
    """A kernel: its name, what Triton made of it, and the key under which it is kept."""

    name: str
    kernel: Any

    @property
    def usage(self) -> dict[str, int]:
        """Registers of a thread, and bytes of its stack, where spilled registers go."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("Triton has no cuobjdump here, so that spills cannot be seen")
        path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        path.write_bytes(self.kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", said)}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Compiled]]:
    """``compiled(capability)`` lists kernels in place of launching them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    kernels: list[Compiled] = []
    run = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(Compiled(self.fn.__name__, run(self, *args, warmup=True, **kwargs)))

    def target(capability: int) -> list[Compiled]:
        class Driver:
            def get_current_device(self) -> int:
                return 1000 + capability  # Triton remembers a device's target

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", capability, 32)

        monkeypatch.setattr(driver, "_active", Driver())
        monkeypatch.setattr(
            "vllm_plugin.kv_cache.latent_cuda.shared_bytes", lambda _: KIB[capability] << 10
        )
        return kernels

    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return target


def layer(bits: int, ranks: tuple[int, int], size: int, heads: int) -> Any:
    """A layer's latents in blocks of 64 tokens, as the worker makes them."""
    from vllm_plugin.kv_cache.latent_cuda import TritonLatentCache

    features, block_size, dtype = heads * size, 64, torch.bfloat16
    cache = torch.zeros(4, heads, block_size, 2 * size, dtype=dtype)
    tokens = LatentFormat.most_tokens(cache[0].numel(), *ranks, bits)
    keys, values = (
        Factor(torch.zeros(features, rank), torch.zeros(rank, features), torch.zeros(features))
        for rank in ranks
    )
    form = LatentFormat(*ranks, bits, tokens)
    rope = Rope(torch.zeros(8192, size))
    return TritonLatentCache(cache.view(4, -1), form, keys, values, rope, cache=cache)


@pytest.mark.parametrize(
    "shape", [*FAST, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW)], ids=str
)
def test_fits_without_spills(
    shape: tuple[int, ...], compiled: Callable[[int], list[Compiled]]
) -> None:
    capability, bits, rk, rv, size, heads = shape
    kernels = compiled(capability)
    layer(bits, (rk, rv), size, heads).warm_up(4 * heads)
    assert len({name for name, _ in kernels}) == len(kernels) >= 3
    for one in kernels:
        shared, usage = one.kernel.metadata.shared, one.usage
        print(f"sm_{capability} {one.name}: {usage['REG']} registers, {shared} bytes shared")
        assert shared <= KIB[capability] << 10, one.name
        assert usage["STACK"] == 0, one.name


def test_steps_compile_nothing(compiled: Callable[[int], list[Compiled]]) -> None:
    """Other numbers of requests, tokens, blocks and programs; or another layer's ranks."""
    from vllm_plugin.kv_cache.latent_triton import Context

    kernels = compiled(90)
    latents = layer(16, (64, 64), 64, 2)
    latents.warm_up(4)
    first = {name: kernel.hash for name, kernel in kernels}
    kernels.clear()
    for count, columns in ((1, 1), (2, 16), (16, 3), (3, 64)):
        ints = torch.zeros(count, dtype=torch.int32)
        table = torch.zeros(count, columns, dtype=torch.int32)
        query = torch.zeros(count, 8, 64, dtype=torch.bfloat16)[:, 2:6]
        context = Context(ints, ints, ints, table, table, ints, ints)
        latents._decode(query, context, 0.1, torch.zeros(count, 4, 64, dtype=torch.bfloat16))
    numbers = torch.zeros(40, dtype=torch.int64)
    for pieces in (1, 3):  # numbers that begin anywhere in their memory
        positions, units = numbers[1 : 1 + pieces], numbers[3 : 3 + 4 * pieces]
        blocks = torch.zeros(pieces, 1, dtype=torch.int64)
        latents.pack([Packing(blocks, positions, units, units, numbers[:0])], None)
    layer(16, (48, 48), 64, 2).warm_up(4)
    assert len(kernels) == 4 * 3 + 2 * 3 + 6
    assert {kernel.hash for _, kernel in kernels} == set(first.values())
