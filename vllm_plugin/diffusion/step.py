# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch, as the model runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Stage:
    """The rows that some layers compute, those of one request after those of the other.

    Attributes:
        first: The first of these layers.
        positions: Position of each row in its request, int64 [T].
        slots: Place of each row in the cache, int64 [T].
    """

    first: int
    positions: torch.Tensor
    slots: torch.Tensor


class Observer(Protocol):
    """Sees queries and keys before attention runs."""

    @property
    def tracked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and slots, int64 [K], whose old queries are needed."""
        ...

    def see(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, past: torch.Tensor | None
    ) -> None:
        """See one layer before its keys are in the cache.

        Args:
            layer: Number of the layer.
            queries: Rotated queries of the layer's rows, [T, Hq * D].
            keys: Rotated keys of these rows, [T, Hkv * D].
            past: Queries of the tracked positions from their old inputs, [K, Hq * D].
        """
        ...


@dataclass(frozen=True)
class DenoiseStep:
    """A step.

    Attributes:
        stages: In the order of ``first``, which is 0 in the first stage.
        observer: None if no policy tracks positions.
    """

    stages: Sequence[Stage]
    observer: Observer | None = None
