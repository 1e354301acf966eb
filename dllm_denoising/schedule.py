# SPDX-License-Identifier: Apache-2.0
"""Schedules, which decide which masked positions a step predicts."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dllm_denoising.canvas import Canvas


class Schedule(Protocol):
    """Chooses the active positions of a canvas: at least one as long as any is masked."""

    def active(self, canvas: Canvas) -> np.ndarray:
        """Return masked positions, int64, in ascending order."""
        ...


@dataclass(frozen=True)
class Window:
    """The leftmost ``length`` masked positions, adjacent or not."""

    length: int

    def __str__(self) -> str:
        return f"the leftmost {self.length} masks"

    def active(self, canvas: Canvas) -> np.ndarray:
        return np.flatnonzero(canvas.masked)[: self.length]


@dataclass(frozen=True)
class Blocks:
    """The masked positions of one block after the other (semi-autoregressive).

    A block has ``length`` positions.
    """

    length: int

    def __str__(self) -> str:
        return f"one block of {self.length} after the other"

    def active(self, canvas: Canvas) -> np.ndarray:
        masked = np.flatnonzero(canvas.masked)
        return masked[self.block(canvas, masked) == self.block(canvas, masked[:1])]

    def block(self, canvas: Canvas, positions: np.ndarray) -> np.ndarray:
        """Return the number of each position's block."""
        return (positions - canvas.prompt) // self.length
