# SPDX-License-Identifier: Apache-2.0
"""Measure an allocation: the divergence of the model's output with some units quantized."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.prefix import PrefixProbe, samples_of
from quant_methods.calibration.levels import LevelDatabase
from quant_methods.grid import SIXTEEN


class ModelProbe(PrefixProbe):
    """See ``allocators.base.Probe``. Blocks before the first quantized unit are not run again.

    Args:
        blocks: The original decoder.
        database: Units at their levels.
        tokens: Calibration tokens in all, rounded up to whole samples; None: all.
    """

    def __init__(self, blocks: Blocks, database: LevelDatabase, tokens: int | None = None) -> None:
        super().__init__(blocks if tokens is None else blocks.first(samples_of(blocks, tokens)))
        self.database = database
        # On all text. A search asks for that of the same allocation again and again.
        self._losses: dict[frozenset[tuple[str, int]], float] = {}

    def __call__(
        self, bits: Mapping[str, int], tokens: int | None = None, seed: int | None = None
    ) -> float:
        """See ``allocators.base.Probe``."""
        if not self.takes_all(tokens):
            return self._loss(bits, tokens, seed)
        key = frozenset(bits.items())
        if key not in self._losses:
            self._losses[key] = self._loss(bits, None, None)
        return self._losses[key]

    def _loss(self, bits: Mapping[str, int], tokens: int | None, seed: int | None) -> float:
        """Measure, with nothing remembered."""
        changed = {unit.rpartition(".")[0] for unit, count in bits.items() if count != SIXTEEN}
        blocks = range(len(self.blocks))
        first = next((i for i in blocks if self.blocks.prefix(i)[:-1] in changed), None)
        if first is None:
            return 0.0

        def step(index: int, hidden: torch.Tensor) -> torch.Tensor:
            # Made here and bound to no name: fp32 weights of one block, not of the model.
            with (
                self.blocks.resident(index) as block,
                self.blocks.replaced(index, self._weights(index, bits)),
                _rounded_inputs(block, self._rounded(index, bits)),
            ):
                return self.blocks.run(index, hidden, out=hidden)

        return self.loss(first, step, tokens, seed)

    def _weights(self, index: int, bits: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the quantized weights of a block, as they are between original neighbors."""
        return {
            name: self.database.weight(linear, count, self.blocks.device)
            for name, linear, count in self._quantized(index, bits)
        }

    def _rounded(self, index: int, bits: Mapping[str, int]) -> list[str]:
        """Return the linears of a block whose kernel rounds activations to 8 bits."""
        return [
            name
            for name, linear, count in self._quantized(index, bits)
            if self.database.weights[linear, count].grid.activations == "int8"
        ]

    def _quantized(self, index: int, bits: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
        """Yield the quantized linears of a block by name in it, full name and bits."""
        prefix = self.blocks.prefix(index)
        for unit in self.blocks.structure.layer(index).units:
            count = bits.get(prefix + unit.name, SIXTEEN)
            if count != SIXTEEN:
                for name in unit.linears:
                    yield name, prefix + name, count


@contextmanager
def _rounded_inputs(block: nn.Module, linears: Iterable[str]) -> Iterator[None]:
    """Round what linears of a block get while the context lasts."""
    hooks = [block.get_submodule(name).register_forward_pre_hook(_round) for name in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Round an input to 8 bits, with a scale for each token, as vLLM's int8 kernel does."""
    x, *others = given
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x / step).round() * step, *others
