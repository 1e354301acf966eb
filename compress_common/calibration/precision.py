# SPDX-License-Identifier: Apache-2.0
"""The type that calibration computes in."""

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from compress_common.errors import CompressError

# A 16-bit model up to this size is converted to float32 at once, which makes sampling faster. Of a
# larger one there are float32 copies of one module at a time.
WHOLE = 512 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_device(device: str | torch.device) -> None:
    """Raise CompressError when PyTorch has no such device."""
    try:
        kind = torch.device(device)
        if kind.type != "cpu":
            torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CompressError(f"the device {device} cannot be used ({reason}); give cpu") from error


def slow_in_16_bit() -> bool:
    """Whether PyTorch computes bfloat16 many times slower than float32 on this processor."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and torch.backends.cpu.get_cpu_capability() != "AVX512"


def computed_in(weight_bytes: int, device: str | torch.device) -> torch.dtype | None:
    """Return the type that a 16-bit model is calibrated in; None: its own.

    float32 on an x86 processor without AVX-512, if the float32 model fits half of the memory. The
    answer does not depend on how much memory is free, so all starts on a machine agree.

    Args:
        weight_bytes: Of the 16-bit model.
        device: Where decoder blocks are computed.
    """
    if torch.device(device).type != "cpu" or not slow_in_16_bit():
        return None
    return torch.float32 if 2 * weight_bytes <= total_memory() // 2 else None


def total_memory() -> int:
    """Return the bytes of memory that this process can use: the machine's, or its container's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max", or no such file
            limits.append(int(Path(file).read_text(encoding="ascii")))
    return min(limits)
