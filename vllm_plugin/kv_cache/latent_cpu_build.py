# SPDX-License-Identifier: Apache-2.0
"""Compiles ``latent_cpu.cpp``, and says where it cannot be used."""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils import cpp_extension
from vllm import envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown

_SOURCE = Path(__file__).with_name("latent_cpu.cpp")
# The least that its products need, rather than all that this processor has: nodes of several kinds
# may share a cache.
_FLAGS = ["-O3", "-fopenmp", "-march=skylake-avx512", "-mprefer-vector-width=512"]
_FLAGS += ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]


@cache
def load() -> Any:
    """The operations of ``latent_cpu.cpp``, compiled once for a version of it and of torch.

    RuntimeError with the reason where there is no compiler.
    """
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((torch.__version__, _FLAGS)).encode())
    library = Path(envs.VLLM_CACHE_ROOT, "compress", f"latent_cpu_{key.hexdigest()[:16]}.so")
    if library.exists():
        torch.ops.load_library(library)
        return torch.ops.vllm_compress_latent
    logger.info("compiling the kernel that reads latents, once, to %s", library)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Engines that start together compile each on their own, and the last one's stays.
        with TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(
                library.stem,
                [str(_SOURCE)],
                extra_cflags=_FLAGS,
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder, library.name), library)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"the kernel could not be compiled: {str(error).strip()[-500:]}"
        ) from error
    return torch.ops.vllm_compress_latent


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """Why latents of this type are not read by the kernel here; None: they are."""
    if dtype != torch.bfloat16:
        return f"the kernel reads bfloat16, and the cache holds {str(dtype).removeprefix('torch.')}"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "this processor has no AVX-512"
    try:
        _ask(load())
    except RuntimeError as error:
        return str(error)
    return None


def _ask(kernel: Any) -> None:
    """32 latents of one number, which is the logit and the value too, and one raw token of zeros.

    RuntimeError where oneDNN has no such products for this processor, or has them wrong.
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
