# SPDX-License-Identifier: Apache-2.0
"""Each policy on the dense model, one request at a time. An engine must give the same tokens."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dllm_denoising.base import Observation, Plan
from dllm_denoising.commit import predict
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.dense import DenseLLaDA
from dllm_denoising.drift import (
    Over,
    attention_mass,
    cosines,
    most_attended,
    probabilities,
    similarity,
)


@dataclass
class Generated:
    """What was generated.

    Attributes:
        tokens: Released tokens, in order.
        plans: The plan of each step, with ``start`` as it was at the end of the step.
    """

    tokens: list[int] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What one step computed.

    Attributes:
        tokens: The canvas before the step, int64 [N].
        plan: The plan of the step.
        logits: Of the active positions, [M, V].
    """

    tokens: np.ndarray
    plan: Plan
    logits: torch.Tensor


@torch.inference_mode()
def generate(
    model: DenseLLaDA,
    denoiser: Denoiser,
    in_step: bool = False,
    watch: Callable[[Step], None] | None = None,
    restarts: Collection[int] = (),
) -> Generated:
    """Denoise one request to the end.

    Args:
        model: The dense model.
        denoiser: The request, at its first step.
        in_step: Let drift that a layer shows refresh the layers behind it in the same step, which
            is the published order. Otherwise it refreshes them in the next step.
        watch: Called with each step before the step commits.
        restarts: Numbers of steps, from 0. Before each of them the cache is lost.

    Returns:
        The released tokens and the plan of each step.
    """
    forward = CachedForward(model, denoiser, in_step)
    result = Generated()
    while not denoiser.finished:
        if denoiser.steps in restarts:
            denoiser.restart()
        plan = denoiser.plan
        logits, seen, start = forward(plan)
        if watch is not None:
            watch(Step(denoiser.canvas.tokens, plan, logits))
        noise = denoiser.noise(*logits.shape)
        confidence, tokens = predict(logits, denoiser.canvas.mask, noise)
        result.plans.append(Plan(plan.rows, start, plan.active, plan.tracked))
        result.tokens += denoiser.advance(confidence.numpy(), tokens.numpy(), seen)
    return result


class CachedForward:
    """The model with cached keys, values and layer inputs of all positions of a canvas."""

    def __init__(self, model: DenseLLaDA, denoiser: Denoiser, in_step: bool) -> None:
        shape, length = model.shape, len(denoiser.canvas)
        self._model, self._denoiser, self._in_step = model, denoiser, in_step
        kv = torch.zeros(shape.n_layers, 1, shape.n_kv_heads, length, shape.head_size)
        self._keys, self._values = kv, kv.clone()
        self._inputs = torch.zeros(shape.n_layers, 1, length, shape.d_model)

    def __call__(self, plan: Plan) -> tuple[torch.Tensor, Observation | None, int]:
        """Run a step.

        Returns:
            Logits [M, V] of the active positions, what was observed, and the first layer that
            computed everything.
        """
        canvas, policy, layers = self._denoiser.canvas, self._denoiser.policy, self._model.blocks
        everything = torch.arange(len(canvas))
        rows = everything if plan.start == 0 else torch.from_numpy(plan.rows)
        start = plan.start
        x = self._model.embed(torch.from_numpy(canvas.tokens)[rows][None])
        similarities, attended = np.full(len(layers), np.nan), []
        for index, layer in enumerate(layers):
            before = self._inputs[index].clone(), self._keys[index].clone()
            self._inputs[index, :, rows] = x
            if index == start and len(rows) < len(canvas):
                rows, x = everything, self._inputs[index].clone()
            q, k, v = layer.attention_inputs(x, rows)
            self._keys[index, :, :, rows], self._values[index, :, :, rows] = k, v
            keys, values = self._keys[index], self._values[index]
            out = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            if policy.tracks:
                seen = _Probe(layer, q, keys, rows, canvas.masked, canvas.limit)
                attended.append(seen.attended(plan.active, policy.tracks))
                if index < start and len(plan.tracked):
                    over = policy.settings.similarity
                    similarities[index] = seen.similarity(plan.tracked, *before, over)
                    if self._in_step and similarities[index] < policy.settings.gamma:
                        start = index + 1
            x = layer.finish(x, out)
        at = torch.searchsorted(rows, torch.from_numpy(plan.active))
        logits = self._model.logits(x[:, at])[0]
        if not policy.tracks:
            return logits, None, start
        if self._in_step:  # the drift has had its effect already
            similarities[:] = np.nan
        return logits, Observation(similarities, np.stack(attended)), start


class _Probe:
    """Watches the attention of one layer."""

    def __init__(self, layer, q, keys, rows, masked, limit) -> None:  # type: ignore[no-untyped-def]
        self._layer, self._q, self._keys, self._rows = layer, q, keys, rows
        self._candidates = torch.from_numpy(~masked & (np.arange(len(masked)) < limit))[None]
        self._there = torch.ones_like(self._candidates)
        self._scale = q.shape[-1] ** -0.5

    def _current(self, positions: np.ndarray) -> torch.Tensor:
        at = torch.searchsorted(self._rows, torch.from_numpy(positions))
        return probabilities(self._q[:, :, at], self._keys, self._scale, self._there)

    def attended(self, active: np.ndarray, count: int) -> np.ndarray:
        rows = torch.ones(1, len(active), dtype=torch.bool)
        mass = attention_mass(self._current(active), rows)
        return most_attended(mass, self._candidates, count)[0].numpy()

    def similarity(
        self, tracked: np.ndarray, inputs: torch.Tensor, keys: torch.Tensor, over: Over
    ) -> float:
        at = torch.from_numpy(tracked)
        queries = self._layer.attention_inputs(inputs[:, at], at)[0]
        past = probabilities(queries, keys, self._scale, self._there)
        rows = torch.ones(1, len(at), dtype=torch.bool)
        found = cosines(past, self._current(tracked), rows, self._there, over)
        return float(similarity(found, rows, self._there, over, past.shape[1]))
