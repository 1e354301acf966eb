# SPDX-License-Identifier: Apache-2.0
"""Loads the kernel of ``latent_cpu.cpp``, or says why it cannot be used here."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch

from vllm_plugin.kv_cache.cpp_library import CppLibrary

_LIBRARY: Final = CppLibrary(
    Path(__file__).with_name("latent_cpu.cpp"),
    # The least that the products need, not all that this processor has: nodes of several kinds may
    # share a cache.
    (
        *("-O3", "-fopenmp", "-march=skylake-avx512", "-mprefer-vector-width=512"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
)


@dataclass(frozen=True)
class LatentReader:
    """What reads latents on this CPU.

    Attributes:
        status: "ok" for the kernel; "slow" for torch, which takes several times as long.
        text: One line; where slow, it says why and what to install.
    """

    status: Literal["ok", "slow"]
    text: str


def latent_reader(dtype: torch.dtype) -> LatentReader:
    """Say what reads latents of this type on this CPU. Compiles the kernel if need be.

    Args:
        dtype: Type of the KV cache.
    """
    if reason := why_not(dtype):
        return LatentReader("slow", f"read by torch, slowly: {reason}")
    return LatentReader("ok", "read by the kernel for CPUs")


@cache
def load() -> Any:
    """Return the operators of ``latent_cpu.cpp``, compiled unless the store has them.

    Raises:
        RuntimeError: The reason in one line.
    """
    _LIBRARY.load()
    return torch.ops.vllm_compress_latent


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """Say in one line why the kernel does not read latents of this type here; None: it does.

    Args:
        dtype: Type of the KV cache.
    """
    if dtype != torch.bfloat16:
        return f"the kernel reads bfloat16, and the cache is {str(dtype).removeprefix('torch.')}"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "this processor has no AVX-512"
    try:
        _ask(load())
    except (RuntimeError, AttributeError) as error:  # the latter: it registered no operator
        return " ".join(str(error).split())
    return None


def _ask(kernel: Any) -> None:
    """Compute a small attention with the kernel and compare the result.

    There are 32 latents of a single number, which is both logit and value, and a raw token of
    zeros.

    Raises:
        RuntimeError: oneDNN lacks such products for this processor, or computes them wrong.
    """
    size, numbers = 16, torch.arange(32) / 8
    # Keys, then values, then a block with the raw token.
    cache = torch.cat((numbers, numbers, torch.zeros(64))).bfloat16().view(2, 64)
    places = torch.zeros(2, 1, 1, size, dtype=torch.int32)
    at = torch.zeros(1, 1, dtype=torch.int64)
    key_decode = torch.zeros(size, 4).bfloat16()
    key_decode[:, 0] = 1 / size
    value_decode = torch.tensor([1.0, 0.0])[:, None].expand(-1, size).contiguous()
    angles = torch.zeros(2, size, 16)
    angles[:, : size // 2] = 1
    query = torch.ones(1, 1, size).bfloat16()
    output = torch.empty_like(query)
    form = 32, 1, 16
    kernel.decode(
        *(query, at, at + 1, at + 1, cache, places, at, at, at + 32, *form),
        *(key_decode, value_decode, torch.arange(size), angles, 1.0, output),
    )
    weights = torch.cat((numbers, torch.zeros(1))).softmax(0)
    want = (weights[:32] @ numbers).bfloat16().expand_as(output)
    if not torch.allclose(output, want):
        raise RuntimeError("oneDNN's products are wrong on this processor")
