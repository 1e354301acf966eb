# SPDX-License-Identifier: Apache-2.0
"""What a cache policy is: it plans what a denoising step computes, one step ahead.

In a bidirectional model keys and values of every position depend on every other, so each commit
makes all cached ones a little stale. A policy decides which positions a step computes at all
(``rows``) and from which layer on it computes them all (``start``): 0 recomputes everything, the
number of layers nothing but the rows. Keys and values of rows are written to the cache before
attention reads it, so a row is never stale to itself.

Deciding a step ahead is what lets an engine batch requests and know the size of a step: what a
step shows of drift changes the next one. The published order is in ``reference``.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from dllm_denoising.canvas import Canvas
from dllm_denoising.schedule import Blocks, Schedule

_NONE = np.empty(0, dtype=np.int64)


class NoSettings(BaseModel):
    """The settings of a policy that has none; the base of all others'."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Plan:
    """One step of one request. Positions are int64 and ascending.

    rows: computed in the layers below ``start``. active: those of them that are predicted.
    tracked: those of them whose attention is compared with what it was.
    """

    rows: np.ndarray
    start: int
    active: np.ndarray
    tracked: np.ndarray = field(default_factory=lambda: _NONE)

    def token_layers(self, length: int, layers: int) -> int:
        """Positions computed, summed over layers, of a canvas of ``length``."""
        return len(self.rows) * self.start + length * (layers - self.start)


@dataclass(frozen=True)
class Observation:
    """What a step showed of one request, by layer.

    similarity: float [L], attention of tracked positions to what it was before; NaN where a layer
    computed everything or nothing was tracked. attended: int64 [L, track], the unmasked positions
    that the active ones attended to most; -1 where there were fewer.
    """

    similarity: np.ndarray
    attended: np.ndarray


class CachePolicy(Protocol):
    """Plans the steps of one request; an instance is made for each.

    tracks: 0, or how many of the most attended positions ``observe`` wants per layer. Where it is
    not 0, a step may start in the middle of the layers, and inputs of all layers are kept.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[NoSettings]]
    paper: ClassVar[str]
    blocks_only: ClassVar[bool]
    settings: Any

    def __init__(self, settings: Any) -> None: ...

    @property
    def tracks(self) -> int: ...

    def plan(self, canvas: Canvas, schedule: Schedule, new: np.ndarray, layers: int) -> Plan:
        """The next step; ``new`` are the positions that the last one committed."""
        ...

    def observe(self, seen: Observation) -> None:
        """Called after each step where ``tracks`` is not 0."""
        ...


class Refreshing:
    """Base of policies that compute either everything or the new and the active positions.

    ``refreshes(step)`` is all they add; the first step, 0, computes everything in any case.
    """

    settings_type: ClassVar[type[NoSettings]] = NoSettings
    blocks_only: ClassVar[bool] = False
    tracks = 0

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._step = 0

    def refreshes(self, step: int) -> bool:
        raise NotImplementedError

    def plan(self, canvas: Canvas, schedule: Schedule, new: np.ndarray, layers: int) -> Plan:
        active = schedule.active(canvas)
        everything = self._step == 0 or self.refreshes(self._step)
        self._step += 1
        if everything:
            return Plan(np.arange(len(canvas)), 0, active)
        return Plan(np.union1d(new, active), layers, active)

    def observe(self, seen: Observation) -> None:
        pass


def current_block(canvas: Canvas, schedule: Blocks, active: np.ndarray) -> np.ndarray:
    """All positions of the block that the active ones are in."""
    first = canvas.prompt + int(schedule.block(canvas, active[:1])[0]) * schedule.length
    return np.arange(first, min(first + schedule.length, len(canvas)))
