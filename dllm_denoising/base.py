# SPDX-License-Identifier: Apache-2.0
"""The interface of a cache policy, which plans what a denoising step computes.

In a bidirectional model, keys and values of each position depend on all other positions. Each
commit therefore makes all cached keys and values a little stale. A policy decides which positions
a step computes (``rows``), and from which layer on the step computes all positions (``start``). A
start of 0 recomputes everything. A start at the number of layers computes only the rows. Keys and
values of the rows are written to the cache before attention reads it, so a row always sees its own
current values.

A policy decides one step ahead, so that an engine knows the size of a step and can batch requests.
Drift that a step shows changes the next step. The published order is in ``reference``.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from dllm_denoising.canvas import Canvas
from dllm_denoising.schedule import Blocks, Schedule

_NONE = np.empty(0, dtype=np.int64)


class NoSettings(BaseModel):
    """The settings of a policy without settings, and the base class of all other settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Plan:
    """One step of one request. Positions are int64 and ascending.

    Args:
        rows: Positions that are computed in the layers below ``start``.
        start: The first layer that computes all positions.
        active: The rows that are predicted.
        tracked: The rows whose attention is compared with their attention in the last step.
    """

    rows: np.ndarray
    start: int
    active: np.ndarray
    tracked: np.ndarray = field(default_factory=lambda: _NONE)

    def token_layers(self, length: int, layers: int) -> int:
        """Return how many positions of a canvas of ``length`` are computed, summed over layers."""
        return len(self.rows) * self.start + length * (layers - self.start)


@dataclass(frozen=True)
class Observation:
    """What a step showed about one request, by layer.

    Args:
        similarity: float [L], how similar the attention of tracked positions is to that of the last
            step. NaN where a layer computed everything, or where nothing was tracked.
        attended: int64 [L, track], the unmasked positions that the active positions attended to
            most. -1 where there were fewer.
    """

    similarity: np.ndarray
    attended: np.ndarray


class CachePolicy(Protocol):
    """Plans the steps of one request. Each request has its own instance.

    ``blocks_only`` says that the policy needs the schedule ``Blocks``.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[NoSettings]]
    paper: ClassVar[str]
    blocks_only: ClassVar[bool]
    settings: Any

    def __init__(self, settings: Any) -> None: ...

    @property
    def tracks(self) -> int:
        """How many of the most attended positions ``observe`` wants per layer, or 0.

        If it is not 0, a step can start in the middle of the layers, and an engine keeps the inputs
        of all layers.
        """
        ...

    def plan(self, canvas: Canvas, schedule: Schedule, new: np.ndarray, layers: int) -> Plan:
        """Return the next step.

        Args:
            canvas: The tokens of the request.
            schedule: Chooses the active positions.
            new: Positions that the last step committed, int64.
            layers: Number of layers of the model.
        """
        ...

    def observe(self, seen: Observation) -> None:
        """Take what a step showed. Called after each step if ``tracks`` is not 0."""
        ...


class Refreshing:
    """The base of policies that compute either everything or the new and the active positions.

    A subclass only defines ``refreshes``. The first step, step 0, always computes everything.
    """

    settings_type: ClassVar[type[NoSettings]] = NoSettings
    blocks_only: ClassVar[bool] = False
    tracks = 0

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._step = 0

    def refreshes(self, step: int) -> bool:
        """Return whether a step from 1 on computes everything."""
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
    """Return all positions of the block that contains the active positions."""
    first = canvas.prompt + int(schedule.block(canvas, active[:1])[0]) * schedule.length
    return np.arange(first, min(first + schedule.length, len(canvas)))
