# SPDX-License-Identifier: Apache-2.0
"""Counts what a worker denoised, for the metrics."""

from dataclasses import dataclass

from dllm_denoising.denoiser import Denoiser


@dataclass
class Done:
    """Sums over requests and steps.

    Attributes:
        steps: Denoising steps.
        refreshes: Steps that computed everything from some layer on.
        token_layers: Computed positions, summed over layers.
        full_token_layers: The same if every step had computed everything.
        tokens: Tokens that became final.
        requests: Requests that were denoised to the end.
        steps_of: Steps of these requests.
    """

    steps: int = 0
    refreshes: int = 0
    token_layers: int = 0
    full_token_layers: int = 0
    tokens: int = 0
    requests: int = 0
    steps_of: int = 0


class Activity:
    """Counts the steps of a model with so many ``layers``."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._done = Done()

    def step(self, denoiser: Denoiser) -> None:
        """Count a step of a request, before the request advances."""
        plan, length = denoiser.plan, len(denoiser.canvas)
        self._done.steps += 1
        self._done.refreshes += plan.start < self._layers
        self._done.token_layers += plan.token_layers(length, self._layers)
        self._done.full_token_layers += length * self._layers

    def ended(self, denoiser: Denoiser, final: int) -> None:
        """Count the tokens that the step made final, without those behind a stop token."""
        self._done.tokens += final
        if denoiser.finished:
            self._done.requests += 1
            self._done.steps_of += denoiser.steps

    def take(self) -> Done:
        """Return what was done since the last call."""
        done, self._done = self._done, Done()
        return done
