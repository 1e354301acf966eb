# SPDX-License-Identifier: Apache-2.0
"""Measure an allocation: the divergence of the model's output with some units quantized."""

from collections.abc import Mapping
from math import ceil

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import NextTokenReference
from quant_methods.calibration.levels import LevelDatabase
from quant_methods.grid import SIXTEEN


class ModelProbe:
    """See ``allocators.base.Probe``. Blocks before the first quantized unit are not run again.

    Memory: the input of every block for the chosen samples.

    Args:
        blocks: The original decoder.
        database: Units at their levels.
        tokens: Calibration tokens in all, rounded up to whole samples; None: all.
    """

    def __init__(self, blocks: Blocks, database: LevelDatabase, tokens: int | None = None) -> None:
        self.blocks = blocks if tokens is None else blocks.first(_samples(blocks, tokens))
        self.database = database
        self._inputs: list[torch.Tensor] = []
        hidden = self.blocks.inputs()
        for index in range(len(self.blocks)):
            self._inputs.append(hidden)
            with self.blocks.resident(index):
                hidden = self.blocks.run(index, hidden)
        self._final = hidden
        self._references: dict[tuple[int | None, int | None], NextTokenReference] = {}
        # On all text. A search asks for that of the same allocation again and again.
        self._losses: dict[frozenset[tuple[str, int]], float] = {}

    def __call__(
        self, bits: Mapping[str, int], tokens: int | None = None, seed: int | None = None
    ) -> float:
        """See ``allocators.base.Probe``."""
        if tokens is None or _samples(self.blocks, tokens) >= len(self.blocks.tokens):
            key = frozenset(bits.items())
            if key not in self._losses:
                self._losses[key] = self._loss(bits, None, None)
            return self._losses[key]
        return self._loss(bits, tokens, seed)

    def _loss(self, bits: Mapping[str, int], tokens: int | None, seed: int | None) -> float:
        """Measure, with nothing remembered."""
        chosen = self._chosen(tokens, seed)
        changed = {unit.rpartition(".")[0] for unit, count in bits.items() if count != SIXTEEN}
        blocks = range(len(self.blocks))
        first = next((i for i in blocks if self.blocks.prefix(i)[:-1] in changed), None)
        if first is None:
            return 0.0
        hidden = self._inputs[first][chosen.to(self.blocks.states)]
        for index in blocks[first:]:
            # Made here and bound to no name: fp32 weights of one block, not of the model.
            with (
                self.blocks.resident(index),
                self.blocks.replaced(index, self._weights(index, bits)),
            ):
                hidden = self.blocks.run(index, hidden, out=hidden)
        key = (tokens, seed)
        if key not in self._references:
            if len(self._references) > 8:  # a search draws fresh samples for each comparison
                self._references.clear()
            self._references[key] = NextTokenReference(
                self.blocks.model,
                self.blocks.structure,
                self._final[chosen.to(self.blocks.states)],
                positions=None,
            )
        return self._references[key].divergence(hidden)

    def _chosen(self, tokens: int | None, seed: int | None) -> torch.Tensor:
        """Return the indices of the samples."""
        samples = len(self.blocks.tokens)
        count = samples if tokens is None else min(samples, _samples(self.blocks, tokens))
        if seed is None:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(samples, generator=generator)[:count].sort().values

    def _weights(self, index: int, bits: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the quantized weights of a block, as they are between original neighbors."""
        prefix = self.blocks.prefix(index)
        weights = {}
        for unit in self.blocks.structure.layer(index).units:
            count = bits.get(prefix + unit.name, SIXTEEN)
            if count == SIXTEEN:
                continue
            for name in unit.linears:
                weights[name] = self.database.weight(prefix + name, count, self.blocks.device)
        return weights


def _samples(blocks: Blocks, tokens: int) -> int:
    return ceil(tokens / blocks.tokens.shape[1])
