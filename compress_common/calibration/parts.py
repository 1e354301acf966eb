# SPDX-License-Identifier: Apache-2.0
"""Weights are computed in parts: as many rows at a time as suit the device."""

import ctypes
from collections.abc import Iterator

import torch

# On a processor fp32 temporaries of a part stay in the cache of a core.
_CACHED = 1 << 18
# On an accelerator each part costs launches, which pay when a part is large.
_LAUNCHED = 1 << 27
_SHARE = 4  # of the free memory an accelerator gives so much less to a part


def free_memory(device: torch.device) -> int:
    """Return the bytes that PyTorch can still allocate on an accelerator; 0: not known."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def trim_heap() -> None:
    """Give freed memory of the heap back to the system.

    glibc keeps what lies below anything that is still used. The temporaries of rounding leave many
    such holes: without this, a process of a 1.1B model grew by 55 MB for each block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def part_size(kind: str, temporaries: int, free: int, cached: int = _CACHED) -> int:
    """Return how many elements are computed at a time.

    Args:
        kind: Of the device, such as ``cuda``.
        temporaries: fp32 values that each element takes meanwhile.
        free: Bytes that can still be allocated on an accelerator.
        cached: The answer for a processor, and the least.
    """
    if kind == "cpu":
        return cached
    return max(cached, min(_LAUNCHED, free // (4 * temporaries * _SHARE)))


def row_parts(weight: torch.Tensor, temporaries: int, cached: int = _CACHED) -> Iterator[slice]:
    """Return slices that cut a weight [N, K] along N, each at least one row.

    Args:
        weight: [N, K].
        temporaries: See ``part_size``.
        cached: See ``part_size``.
    """
    outputs, inputs = weight.shape
    elements = part_size(weight.device.type, temporaries, free_memory(weight.device), cached)
    rows = max(1, elements // inputs)
    return (slice(start, start + rows) for start in range(0, outputs, rows))
