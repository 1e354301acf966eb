# SPDX-License-Identifier: Apache-2.0
"""The kernel of GPTQ gives what the loop of single operations gives, and compiles for CUDA.

It runs on the GPU where there is one, else in Triton's interpreter. Triton has to know that before
it is imported, so this file then runs itself in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_methods.grid import Grid
from quant_methods.roundings import gptq
from quant_methods.roundings.gptq import GPTQ

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS = INTERPRETED or DEVICE == "cuda"
runs = pytest.mark.skipif(not RUNS, reason="test_in_the_interpreter runs it")


@pytest.mark.skipif(RUNS, reason="already in a process that can run it")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def inputs(columns: int, n: int, device: str, bits: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    high = torch.randint(1, 1 << bits, (columns, n), generator=generator).float()
    inverse = torch.randn(columns + 8, columns + 8, generator=generator) * 0.1
    inverse.diagonal().abs_().add_(0.5)
    inverse = inverse.triu().to(device)
    tensors = {
        "left": torch.randn(columns, n, generator=generator),
        "scales": torch.rand(columns, n, generator=generator) * 0.3 + 0.05,
        "lowest": high - (1 << bits) + 1,
        "highest": high,
        "inverse": inverse[:columns, :columns],  # a view of a larger matrix
        "codes": torch.empty(columns, n),
        "errors": torch.empty(columns, n),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@runs
@pytest.mark.parametrize(("columns", "n"), [(64, 80), (32, 32), (1, 5), (40, 33)])
def test_a_block_is_that_of_single_operations(columns: int, n: int) -> None:
    from quant_methods.roundings.gptq_triton import round_block

    found, wanted = inputs(columns, n, DEVICE), inputs(columns, n, "cpu")
    gptq._round_block(*wanted.values(), None)
    round_block(**found)
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert (found["codes"] == wanted["codes"]).float().mean() > 0.999
    torch.testing.assert_close(found["codes"][0], wanted["codes"][0], rtol=0, atol=0)
    same = (found["codes"] == wanted["codes"]).all(0)  # a tie may fall to the other side
    torch.testing.assert_close(
        found["errors"][:, same], wanted["errors"][:, same], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found["codes"], found["codes"].round())


@runs
def test_a_weight_is_that_of_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_methods.roundings.gptq_triton import round_block

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 160, generator=generator) for n in (48, 400))
    gram, grid = x.t() @ x / len(x), Grid(32)
    wanted = GPTQ().round(weight, grid, gram)
    used = []

    def fused(*args: Any) -> None:
        used.append(len(args[0]))
        round_block(*args)

    monkeypatch.setattr(gptq, "_fused", lambda: fused)
    if INTERPRETED:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = GPTQ().round(weight.to(DEVICE), grid, gram.to(DEVICE)).to("cpu")
    assert used == [64, 64, 32]
    # Another device sums in another order.
    assert (found.q != wanted.q).float().mean() < (0.002 if INTERPRETED else 0.05)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_cuda(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to machine code, without registers that spill."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from quant_methods.roundings.gptq_triton import round_block

    class Driver:
        def get_current_device(self) -> int:
            return 2000 + capability  # Triton remembers a device's target

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
    round_block(**inputs(64, 4096, "cpu"))
    (kernel,) = kernels
    assert kernel.asm["cubin"]
    assert ".local" not in kernel.asm["ptx"]
