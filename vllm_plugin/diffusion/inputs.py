# SPDX-License-Identifier: Apache-2.0
"""The inputs of a step on the device: one copy, to the same place for each step of a shape."""

from collections.abc import Sequence

import numpy as np
import torch

_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}
_ALIGNMENT = 16  # bytes, as kernels like to read


class StepInputs:
    """Memory on the device that holds the inputs of the current step.

    On the host there is pinned memory of the same size, from which a copy does not wait. Each step
    writes to it, so a step must have read its result back before the next one is loaded. On a CPU
    both are the same memory, and nothing is copied.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocate memory.

        Args:
            size: Bytes of the largest step; see ``size_of``.
            device: Where the step runs.
        """
        self.device = device
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._here = self._there
        if device.type != "cpu":
            self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def load(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Copy arrays to the device, one behind the other.

        An array's place depends on the sizes of the arrays before it and on nothing else.

        Args:
            arrays: int64 or int32, of any shapes.

        Returns:
            A tensor of the same shape per array. The next call overwrites it.
        """
        here, end, spans = self._here.numpy(), 0, []
        for array in arrays:
            spans.append(slice(end, end + array.nbytes))
            here[spans[-1]].view(array.dtype)[:] = array.ravel()
            end += _aligned(array.nbytes)
        if self._here is not self._there:
            self._there[:end].copy_(self._here[:end], non_blocking=True)
        return [
            self._there[span].view(_TYPES[array.dtype]).view(array.shape)
            for span, array in zip(spans, arrays, strict=True)
        ]


def size_of(sizes: Sequence[int]) -> int:
    """Return the bytes that ``StepInputs`` needs for arrays of these sizes in bytes."""
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
