# SPDX-License-Identifier: Apache-2.0
"""What was planned on the host, on the device."""

import numpy as np
import torch

from kv_policies.layout.segments import IntArray


def to_device(device: torch.device, *arrays: IntArray) -> list[torch.Tensor]:
    """Copy arrays in one piece, without waiting for the device.

    Args:
        device: Where to. On the host nothing is copied.
        arrays: int64, of any shapes.

    Returns:
        A tensor of the same shape per array.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    sizes = [array.size for array in arrays]
    # Only from pinned memory does a copy not wait. It is fresh each time: PyTorch's host allocator
    # records an event behind the copy, and gives the memory to others once that has passed.
    pinned = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    np.concatenate([array.ravel() for array in arrays], out=pinned.numpy())
    parts = pinned.to(device, non_blocking=True).split(sizes)
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
