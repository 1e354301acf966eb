# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch, as the model runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Stage:
    """The rows that layers from ``first`` on compute, those of one request after the other.

    positions, slots: int64 [T], in the request and in the cache.
    """

    first: int
    positions: torch.Tensor
    slots: torch.Tensor


class Observer(Protocol):
    """Sees what attention is about to see."""

    @property
    def tracked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and slots, int64 [K], whose old queries are wanted."""
        ...

    def see(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, past: torch.Tensor | None
    ) -> None:
        """Queries [T, Hq * D] and keys [T, Hkv * D] of a layer's rows after RoPE, before the keys
        are in the cache; past: the tracked positions' queries [K, Hq * D] from their old inputs."""
        ...


@dataclass(frozen=True)
class DenoiseStep:
    """stages: ordered by ``first``, which is 0 in the first. observer: None if nobody tracks."""

    stages: Sequence[Stage]
    observer: Observer | None = None
