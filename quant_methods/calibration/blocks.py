# SPDX-License-Identifier: Apache-2.0
"""Run a Hugging Face decoder one block at a time on calibration tokens.

The compute device holds the weights of at most one block, and the hidden states that ``Blocks.run``
is given. The rest of the model stays where it was loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress_common.errors import CompressError
from quant_methods.architecture import Architecture
from quant_methods.calibration.stages import Stages


class Blocks:
    """The decoder blocks of a model, and the arguments that each is called with.

    Args:
        model: A ``transformers`` causal language model.
        arch: Its family.
        tokens: Calibration tokens, int64 [samples, length]; None for a method without calibration.
        device: Where blocks are computed.
        stages: Keeps finished parts of the work; None: nothing is kept.

    Attributes:
        hidden: The input of the first block, [samples, length, hidden], on ``device``.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        tokens: torch.Tensor | None,
        device: str | torch.device = "cpu",
        stages: Stages | None = None,
    ) -> None:
        self.stages = stages or Stages()
        self.model = model
        self.arch = arch
        self.device = torch.device(device)
        self.layers: list[nn.Module] = list(model.get_submodule(arch.layers_prefix))  # type: ignore[arg-type]
        self._kwargs: list[dict[str, Any]] = []
        self._tokens = tokens
        if tokens is not None:
            self.hidden = self._record(tokens)

    @torch.no_grad()
    def _record(self, tokens: torch.Tensor) -> torch.Tensor:
        """Record the arguments of every block, in one pass through identities in their place."""
        first: list[torch.Tensor] = []

        def identity(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                raise CompressError(
                    "this transformers version passes block arguments by position; "
                    "install the version named in the README's compatibility table"
                )
            first.append(hidden)
            self._kwargs.append(kwargs | {"past_key_values": None, "use_cache": False})
            return hidden

        try:
            for layer in self.layers:
                layer.forward = identity  # type: ignore[method-assign]
            backbone = self.model.get_submodule(self.arch.layers_prefix.rpartition(".")[0])
            backbone(input_ids=tokens, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        self._kwargs = [self._to_device(kwargs) for kwargs in self._kwargs]
        return self._to_device(first[0])

    def _to_device(self, tree: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device), tree)

    def first(self, samples: int) -> "Blocks":
        """Return the same blocks on the first ``samples`` calibration sequences."""
        assert self._tokens is not None
        return Blocks(self.model, self.arch, self._tokens[:samples], self.device)

    def prefix(self, index: int) -> str:
        """Return what the full names of a block's tensors start with."""
        return f"{self.arch.layers_prefix}.{index}."

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Keep a block on the compute device for as long as the context lasts."""
        layer = self.layers[index]
        home = next(layer.parameters()).device
        try:
            yield layer.to(self.device)
        finally:
            layer.to(home)

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of a resident block.

        Args:
            index: Of the block.
            hidden: Its input, [samples, length, hidden].

        Raises:
            CompressError: The output is not finite.
        """
        out = self.layers[index](hidden, **self._kwargs[index])
        out = out[0] if isinstance(out, tuple) else out
        if not bool(torch.isfinite(out.sum(dtype=torch.float32))):
            raise CompressError(
                f"decoder block {index} gives NaN or infinity on the calibration text; "
                "the checkpoint is damaged or its dtype overflows (try bfloat16)"
            )
        return out

    def argument(self, index: int, name: str) -> Any:
        """Return a keyword argument that a block is called with; None if there is none."""
        return self._kwargs[index].get(name)

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
        """Give the linears of a block other weights for as long as the context lasts."""
        layer = self.layers[index]
        saved = {}
        try:
            for name, weight in weights.items():
                parameter = layer.get_submodule(name).weight
                saved[name] = parameter.data
                parameter.data = weight.to(parameter.dtype)
            yield
        finally:
            for name, data in saved.items():
                layer.get_submodule(name).weight.data = data
