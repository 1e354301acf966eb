# SPDX-License-Identifier: Apache-2.0
"""Recompute from some layer on when the attention of the most attended tokens drifts."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dllm_denoising.base import NoSettings, Observation, Plan
from dllm_denoising.canvas import Canvas
from dllm_denoising.schedule import Schedule


class ElasticSettings(NoSettings):
    gamma: float = Field(
        0.9,
        ge=0,
        le=1,
        description="a similarity below this is drift; larger: more is recomputed, less is stale",
    )
    track: int = Field(
        1, ge=1, le=16, description="most attended tokens that each layer tracks; more: surer tests"
    )
    similarity: Literal["row", "heads"] = Field(
        "row",
        description="cosine over a row of attention, as in the paper, or over the heads, as in the "
        "authors' code, which mistakes keys that no head attends to for drift",
    )


def next_start(similarity: np.ndarray, gamma: float) -> int:
    """Return the layer behind the first layer that drifted, or L if none did.

    Args:
        similarity: float [L]. NaN is no drift.
        gamma: A similarity below this is drift.
    """
    drifted = np.flatnonzero(similarity < gamma)
    return int(drifted[0]) + 1 if len(drifted) else len(similarity)


class Elastic:
    """Elastic-Cache, which here decides one step late.

    It needs a model in which all positions see all others. In a block-causal model, nothing before
    the active block ever changes.
    """

    name: ClassVar[str] = "elastic"
    settings_type: ClassVar[type[NoSettings]] = ElasticSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14973"
    blocks_only: ClassVar[bool] = False

    def __init__(self, settings: ElasticSettings) -> None:
        self.settings = settings
        self._seen: Observation | None = None

    @property
    def tracks(self) -> int:
        return self.settings.track

    def plan(self, canvas: Canvas, schedule: Schedule, new: np.ndarray, layers: int) -> Plan:
        active = schedule.active(canvas)
        if self._seen is None:
            return Plan(np.arange(len(canvas)), 0, active)
        attended = self._seen.attended
        tracked = np.unique(attended[(attended >= 0) & (attended < canvas.limit)])
        rows = np.union1d(np.union1d(tracked, new), active)
        return Plan(rows, next_start(self._seen.similarity, self.settings.gamma), active, tracked)

    def observe(self, seen: Observation) -> None:
        self._seen = seen
