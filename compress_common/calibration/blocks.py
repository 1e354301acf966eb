# SPDX-License-Identifier: Apache-2.0
"""Run a Hugging Face decoder one block at a time on calibration tokens.

A model that lies on the compute device stays there. Otherwise the device holds the weights of at
most one block: they are copied to it, and never back. Hidden states stay where ``states`` says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress_common.calibration.collectors import Collector
from compress_common.calibration.residency import copied
from compress_common.calibration.stages import Stages
from compress_common.errors import CompressError
from compress_common.structure.structure import Structure

CHUNK_TOKENS = 4096  # 0.25 GB of fp32 inputs of an 8B model's down_proj


class Blocks:
    """The decoder blocks of a model, and the arguments that each is called with.

    Args:
        model: A ``transformers`` causal language model.
        structure: Of the model.
        tokens: Calibration tokens, int64 [samples, length]; None for a method without calibration.
        device: Where blocks are computed.
        stages: Keeps finished parts of the work; None: nothing is kept.
        chunk_tokens: Tokens that run through a block at once, in whole samples.
        dtype: What the quantized model is served in; None: the type of ``model``.
        states: Where hidden states lie between blocks; None: where the model does.
        computed: What blocks compute in; None: the type of ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        tokens: torch.Tensor | None,
        device: str | torch.device = "cpu",
        stages: Stages | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        dtype: torch.dtype | None = None,
        states: torch.device | None = None,
        computed: torch.dtype | None = None,
    ) -> None:
        self.stages = stages or Stages()
        self.model = model
        self.structure = structure
        self.device = torch.empty(0, device=device).device  # "cuda" has no index
        self.layers: list[nn.Module] = list(model.get_submodule(structure.layers))  # type: ignore[arg-type]
        self.chunk_tokens = chunk_tokens
        self.dtype: torch.dtype = dtype or model.dtype  # type: ignore[assignment]
        self.computed = computed
        self.states: torch.device = states or model.device  # type: ignore[assignment]
        self._kwargs: list[dict[str, Any]] = []
        self._tokens = tokens
        if tokens is not None:
            kwargs: list[dict[str, Any]] = []
            self._embedded(tokens[:1], kwargs)  # they are the same for every sample
            self._kwargs = self._to_device(kwargs)

    @property
    def tokens(self) -> torch.Tensor:
        """The calibration tokens, int64 [samples, length]."""
        assert self._tokens is not None, "this method was given no calibration text"
        return self._tokens

    @property
    def scale_dtype(self) -> torch.dtype:
        """What the scales of the quantized model are rounded to."""
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    def inputs(self) -> torch.Tensor:
        """Return the input of the first block, a new [samples, length, hidden] for each call."""
        parts = [
            self._embedded(self.tokens[part]).to(self.states)
            for part in self.chunks(len(self.tokens))
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def chunks(self, samples: int) -> Iterator[slice]:
        """Return the parts of so many samples that are computed at a time."""
        step = max(1, self.chunk_tokens // self.tokens.shape[1])
        return (slice(start, start + step) for start in range(0, samples, step))

    @torch.no_grad()
    def _embedded(
        self, tokens: torch.Tensor, recorded: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """Return the input of the first block, in one pass through identities in the blocks' place.

        Args:
            tokens: int64 [samples, length].
            recorded: Takes the arguments that each block is called with.
        """
        first: list[torch.Tensor] = []

        def identity(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                raise CompressError(
                    "this transformers version passes block arguments by position; "
                    "install the version named in the README's compatibility table"
                )
            first.append(hidden)
            if recorded is not None:
                off = {"past_key_values": None, "use_cache": False}
                recorded.append(kwargs | {key: off[key] for key in off if key in kwargs})
            return hidden

        own = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = identity  # type: ignore[method-assign]
            backbone = self.model.get_submodule(self.structure.backbone)
            backbone(input_ids=tokens.to(self.model.device), use_cache=False)  # type: ignore[arg-type]
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:  # see residency.widen
                    layer.forward = forward
        return first[0]

    def _to_device(self, tree: Any) -> Any:
        """Copy tensors to the compute device. Those that blocks share are copied once."""
        known: dict[int, torch.Tensor] = {}
        return tree_map_only(
            torch.Tensor, lambda t: known.setdefault(id(t), t.to(self.device)), tree
        )

    def first(self, samples: int) -> "Blocks":
        """Return the same blocks on the first ``samples`` calibration sequences."""
        return self.on(self.tokens[:samples])

    def on(self, tokens: torch.Tensor) -> "Blocks":
        """Return the same blocks on other calibration tokens, int64 [samples, length]."""
        settings = self.device, self.stages, self.chunk_tokens, self.dtype
        return Blocks(self.model, self.structure, tokens, *settings, self.states, self.computed)

    def prefix(self, index: int) -> str:
        """Return what the full names of a block's tensors start with."""
        return f"{self.structure.layers}.{index}."

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Keep a block on the compute device for as long as the context lasts.

        Its own tensors stay where they are, so nothing is copied back. Changes of weights last as
        long as the context.
        """
        layer = self.layers[index]
        with copied(layer, self.device, self.computed):
            yield layer

    @torch.no_grad()
    def run(
        self,
        index: int,
        hidden: torch.Tensor,
        collectors: Sequence[Collector] = (),
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output of a resident block, computed in chunks of samples.

        The host waits for the device once, at the end.

        Args:
            index: Of the block.
            hidden: Its input, [samples, length, hidden].
            collectors: Are shown the inputs of the linears that they name.
            weights: How much each token counts in them, fp32 [samples, length]; None: all count
                alike.
            out: Takes the output, and may be ``hidden``; None: a new tensor.

        Raises:
            CompressError: The output is not finite.
        """
        result = torch.empty_like(hidden) if out is None else out
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for part in self.chunks(len(hidden)):
            chunk = hidden[part].to(self.device)
            counted = None if weights is None else weights[part].flatten()
            with self._shown(index, collectors, counted):
                value = self.output(index, chunk)
            finite &= torch.isfinite(value.sum(dtype=torch.float32))
            result[part] = value
        if not bool(finite):
            raise CompressError(
                f"decoder block {index} gives NaN or infinity on the calibration text; "
                "the checkpoint is damaged or its dtype overflows (try bfloat16)"
            )
        return result

    def output(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a resident block makes of hidden states that lie on its device.

        Unlike ``run``, it neither cuts them into chunks nor keeps gradients from being recorded.
        """
        value = self.layers[index](hidden, **self._kwargs[index])
        return value[0] if isinstance(value, tuple) else value

    @contextmanager
    def _shown(
        self, index: int, collectors: Sequence[Collector], weights: torch.Tensor | None
    ) -> Iterator[None]:
        """Show collectors what the linears of a block get while the context lasts."""

        def see(name: str, x: torch.Tensor) -> None:
            x = x.flatten(0, -2).float()
            for collector in collectors:
                if name in collector.linears:
                    collector.see(name, x, weights)

        names = sorted({name for collector in collectors for name in collector.linears})
        with self.watch(index, tuple(names), see):
            yield

    def arguments(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments that a block is called with: its mask and its RoPE."""
        return self._kwargs[index]

    @contextmanager
    def watch(
        self, index: int, names: tuple[str, ...], seen: Callable[[str, torch.Tensor], None]
    ) -> Iterator[None]:
        """Call ``seen(name, input [.., K])`` whenever one of the named linears of a block runs."""
        handles = []
        for name in names:
            module = self.layers[index].get_submodule(name)

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen(name, args[0])

            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaced(self, index: int, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """Give the linears of a resident block other weights for as long as the context lasts.

        They are copied to the block's device and type where they are not there.
        """
        layer = self.layers[index]
        saved = {}
        try:
            for name, weight in weights.items():
                parameter = layer.get_submodule(name).weight
                saved[name] = parameter.data
                parameter.data = weight.to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, data in saved.items():
                layer.get_submodule(name).weight.data = data
