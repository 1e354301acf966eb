# SPDX-License-Identifier: Apache-2.0
"""What a worker denoised: counted where it happens, read by whoever reports it."""

from dataclasses import dataclass

from dllm_denoising.denoiser import Denoiser


@dataclass
class Done:
    """Sums over requests and steps. token_layers: positions computed, over all layers; full_:
    what computing everything would have been. refreshes: steps that computed everything from some
    layer on. tokens: that became final. requests: denoised to the end; steps_of: theirs."""

    steps: int = 0
    refreshes: int = 0
    token_layers: int = 0
    full_token_layers: int = 0
    tokens: int = 0
    requests: int = 0
    steps_of: int = 0


class Activity:
    """Counts a model's steps. ``layers``: of the model."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._done = Done()

    def step(self, denoiser: Denoiser) -> None:
        """Count the step that a request is about to end."""
        plan, length = denoiser.plan, len(denoiser.canvas)
        self._done.steps += 1
        self._done.refreshes += plan.start < self._layers
        self._done.token_layers += plan.token_layers(length, self._layers)
        self._done.full_token_layers += length * self._layers

    def ended(self, denoiser: Denoiser, final: int) -> None:
        """Count the tokens that the step made final; none that a stop token drops."""
        self._done.tokens += final
        if denoiser.finished:
            self._done.requests += 1
            self._done.steps_of += denoiser.steps

    def take(self) -> Done:
        """What was done since the last call."""
        done, self._done = self._done, Done()
        return done
