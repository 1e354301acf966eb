# SPDX-License-Identifier: Apache-2.0
"""One request's denoising: what to compute next, and what to make of it."""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from dllm_denoising.base import CachePolicy, Observation, Plan
from dllm_denoising.canvas import Canvas
from dllm_denoising.commit import gumbel
from dllm_denoising.settings import Decoding


class Denoiser:
    """Canvas, schedule, commit rule and cache policy of a request.

    prompt: token ids. length: masks behind it. mask: the mask token. stops: see ``Canvas``.
    layers: of the model. temperature: 0 takes the likeliest token. seed: of the noise otherwise.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        length: int,
        decoding: Decoding,
        policy: CachePolicy,
        *,
        mask: int,
        layers: int,
        stops: Collection[int] = (),
        fill: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.canvas = Canvas(prompt, length, mask, stops, fill)
        self.policy = policy
        self._schedule, self._rule = decoding.schedule(), decoding.rule()
        self._layers, self._temperature = layers, temperature
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._plan = self._next(np.empty(0, dtype=np.int64))

    @property
    def plan(self) -> Plan:
        """The step to run next."""
        return self._plan

    @property
    def finished(self) -> bool:
        return self.canvas.finished

    def noise(self, vocabulary: int) -> torch.Tensor | None:
        """For ``commit.predict`` of this step's active rows; None at temperature 0."""
        if self._temperature == 0:
            return None
        return gumbel((len(self._plan.active), vocabulary), self._temperature, self._generator)

    def advance(
        self, confidence: np.ndarray, tokens: np.ndarray, seen: Observation | None = None
    ) -> list[int]:
        """End the step: commit, and plan the next one. Returns the tokens that became final.

        confidence, tokens: of the active positions, in their order.
        """
        if self.policy.tracks:
            assert seen is not None
            self.policy.observe(seen)
        chosen = self._rule.choose(confidence)
        new = self._plan.active[chosen]
        self.canvas.commit(new, tokens[chosen])
        self.steps += 1
        if not self.finished:
            self._plan = self._next(new[new < self.canvas.limit])
        return self.canvas.release()

    def restart(self) -> None:
        """Keep what is committed and forget what is cached: the next step computes everything."""
        self.policy = type(self.policy)(self.policy.settings)
        self._plan = self._next(np.empty(0, dtype=np.int64))

    def _next(self, new: np.ndarray) -> Plan:
        return self.policy.plan(self.canvas, self._schedule, new, self._layers)
