# SPDX-License-Identifier: Apache-2.0
"""Which masked positions are predicted in a step."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dllm_denoising.canvas import Canvas


class Schedule(Protocol):
    """Chooses the active positions of a canvas; some, as long as any is masked."""

    def active(self, canvas: Canvas) -> np.ndarray:
        """Masked positions, int64, ascending."""
        ...


@dataclass(frozen=True)
class Window:
    """The leftmost ``length`` masked positions, next to each other or not."""

    length: int

    def __str__(self) -> str:
        return f"the leftmost {self.length} masks"

    def active(self, canvas: Canvas) -> np.ndarray:
        return np.flatnonzero(canvas.masked)[: self.length]


@dataclass(frozen=True)
class Blocks:
    """The masked positions of one block of ``length`` after the other (semi-autoregressive)."""

    length: int

    def __str__(self) -> str:
        return f"one block of {self.length} after the other"

    def active(self, canvas: Canvas) -> np.ndarray:
        masked = np.flatnonzero(canvas.masked)
        return masked[self.block(canvas, masked) == self.block(canvas, masked[:1])]

    def block(self, canvas: Canvas, positions: np.ndarray) -> np.ndarray:
        """The number of the block that each position lies in."""
        return (positions - canvas.prompt) // self.length
