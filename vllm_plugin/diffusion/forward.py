# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a denoising step, replayed where its shape is known."""

from collections.abc import Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import AttentionMetadataBuilder

from vllm_plugin.diffusion.batch import Prepared, largest, prepare, shape_of
from vllm_plugin.diffusion.graphs import Pass, Shape, captured
from vllm_plugin.diffusion.inputs import StepInputs
from vllm_plugin.diffusion.running import Running
from vllm_plugin.diffusion.step import DenoiseStep, Observer

# A builder of attention metadata, and the number of each layer that it builds for, by name.
Builders = Sequence[tuple[AttentionMetadataBuilder, dict[str, int]]]


class Forward:
    """Loads the inputs of a step and computes hidden states from them."""

    def __init__(
        self,
        config: VllmConfig,
        model: nn.Module,
        builders: Builders,
        shapes: Sequence[Shape],
        device: torch.device,
    ) -> None:
        """Allocate what all steps share.

        Args:
            config: Of the engine.
            model: The model, a ``LLaDAModelLM``.
            builders: Of all attention layers.
            shapes: What steps can be padded to.
            device: Where the model is.
        """
        self._config, self._model, self._builders = config, model, builders
        self._layers, self.shapes = len(model.model.layers), shapes
        scheduler, block = config.scheduler_config, config.cache_config.block_size
        length, requests = config.model_config.max_model_len, scheduler.max_num_seqs
        largest_shape = max(shape.rows for shape in shapes) if shapes else 0
        size = largest(
            rows=max(scheduler.max_num_batched_tokens, largest_shape),
            requests=max(requests, *(shape.requests for shape in shapes), 1),
            blocks=-(-length // block),
            stages=min(self._layers, requests + 1),
        )
        self._inputs = StepInputs(size, device)
        width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
        self._hidden = torch.zeros(largest_shape, width, dtype=dtype, device=device)
        self._passes: dict[Shape, Pass] = {}

    def capture(self) -> None:
        """Warm up and capture each shape, before the first request."""
        self._passes = captured(self.shapes, self._empty, self._inputs.device)

    def prepare(self, batch: Sequence[Running]) -> Prepared:
        """Load the inputs of the next step, padded to a captured shape if it fits one."""
        shape = shape_of(batch, self._layers, self._passes)
        return prepare(batch, self._layers, self._inputs, shape)

    def __call__(self, prepared: Prepared, observer: Observer | None) -> torch.Tensor:
        """Return hidden states [T, width] of the rows of the last stage."""
        if prepared.shape is None:
            return self._compute(prepared, observer)
        self._passes[prepared.shape]()
        return self._hidden[: prepared.shape.rows]

    def _empty(self, shape: Shape) -> Pass:
        prepared = prepare([], self._layers, self._inputs, shape)

        def run() -> None:
            self._hidden[: shape.rows].copy_(self._compute(prepared, None))

        return run

    def _compute(self, prepared: Prepared, observer: Observer | None) -> torch.Tensor:
        metadata, slots = {}, {}
        for builder, indices in self._builders:
            built = {
                # Fast, FlashAttention builds no schedule, which would be memory of this step.
                first: builder.build(0, common, prepared.shape is not None)
                for first, common in prepared.metadata.items()
            }
            for name, index in indices.items():
                stage = [one for one in prepared.stages if one.first <= index][-1]
                metadata[name], slots[name] = built[stage.first], stage.slots
        first = prepared.stages[0]
        rows = len(first.positions)
        with set_forward_context(metadata, self._config, num_tokens=rows, slot_mapping=slots):
            step = DenoiseStep(prepared.stages, observer)
            return self._model(prepared.tokens, first.positions, step=step)
