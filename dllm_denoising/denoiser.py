# SPDX-License-Identifier: Apache-2.0
"""The denoising of one request: what to compute next, and what to commit."""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from dllm_denoising.base import CachePolicy, Observation, Plan
from dllm_denoising.canvas import Canvas
from dllm_denoising.commit import gumbel
from dllm_denoising.settings import Decoding


class Denoiser:
    """Canvas, schedule, commit rule and cache policy of one request."""

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
        """Plan the first step.

        Args:
            prompt: Token ids.
            length: Number of masks behind the prompt.
            decoding: Schedule and commit rule.
            policy: A policy that no other request uses.
            mask: The mask token.
            layers: Number of layers of the model.
            stops: Tokens that end the text, see ``Canvas``.
            fill: The token behind a stop token, see ``Canvas``.
            temperature: 0 takes the likeliest token. Above 0, tokens are sampled.
            seed: Seed of the sampling.
        """
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
        """Whether all positions are committed."""
        return self.canvas.finished

    @property
    def samples(self) -> bool:
        """Whether the temperature is above 0, so that ``noise`` is added."""
        return self._temperature > 0

    def noise(self, rows: int, vocabulary: int) -> torch.Tensor | None:
        """Return ``commit.predict``'s noise for the next ``rows`` active rows of this step.

        None at temperature 0.
        """
        if not self.samples:
            return None
        return gumbel((rows, vocabulary), self._temperature, self._generator)

    def advance(
        self, confidence: np.ndarray, tokens: np.ndarray, seen: Observation | None = None
    ) -> list[int]:
        """End the step: commit tokens and plan the next step.

        Args:
            confidence: Probability of each active position's token, float64 [M].
            tokens: Those tokens, int64 [M].
            seen: What the step showed. Needed if the policy tracks positions.

        Returns:
            The tokens that became final.
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
        """Keep committed tokens and forget the cache, so that the next step computes everything."""
        self.policy = type(self.policy)(self.policy.settings)
        self._plan = self._next(np.empty(0, dtype=np.int64))

    def _next(self, new: np.ndarray) -> Plan:
        return self.policy.plan(self.canvas, self._schedule, new, self._layers)
