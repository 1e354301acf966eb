# SPDX-License-Identifier: Apache-2.0
"""Measure a changed decoder without running the blocks in front of the first change again."""

from collections.abc import Callable
from math import ceil

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import NextTokenReference
from compress_common.progress import Progress, silent

_REFERENCES = 8  # a search draws fresh samples for each comparison


class PrefixProbe:
    """The original decoder's hidden states, from any of which a changed decoder can be run.

    Memory: the input of every block for all samples.

    Args:
        blocks: The original decoder, with calibration tokens.
        progress: Called for each block.

    Attributes:
        blocks: The same.
        inputs: Of each block, and the output of the last one, [samples, length, hidden] each.
    """

    def __init__(self, blocks: Blocks, progress: Progress = silent) -> None:
        self.blocks = blocks
        self.inputs: list[torch.Tensor] = [blocks.inputs()]
        for index in range(len(blocks)):
            progress("hidden states", index, len(blocks))
            with blocks.resident(index):
                self.inputs.append(blocks.run(index, self.inputs[-1]))
        self._references: dict[tuple[int | None, int | None], NextTokenReference] = {}

    def takes_all(self, tokens: int | None) -> bool:
        """Return whether so many tokens are all that there are."""
        return tokens is None or samples_of(self.blocks, tokens) >= len(self.blocks.tokens)

    def loss(
        self,
        first: int,
        step: Callable[[int, torch.Tensor], torch.Tensor],
        tokens: int | None = None,
        seed: int | None = None,
    ) -> float:
        """Return the mean KL(original || changed) of the next token, in nats per token.

        Args:
            first: The first block that is changed.
            step: Returns the output of a changed block for its input, which it may overwrite.
            tokens: Calibration tokens, rounded up to whole samples; None: all.
            seed: Chooses the samples; None: the first ones.
        """
        chosen = self._chosen(tokens, seed).to(self.blocks.states)
        hidden = self.inputs[first][chosen]
        for index in range(first, len(self.blocks)):
            hidden = step(index, hidden)
        key = (tokens, seed)
        if key not in self._references:
            if len(self._references) > _REFERENCES:
                self._references.clear()
            model, structure = self.blocks.model, self.blocks.structure
            final = self.inputs[-1][chosen]
            self._references[key] = NextTokenReference(model, structure, final, positions=None)
        return self._references[key].divergence(hidden)

    def _chosen(self, tokens: int | None, seed: int | None) -> torch.Tensor:
        """Return the indices of the samples."""
        samples = len(self.blocks.tokens)
        count = samples if tokens is None else min(samples, samples_of(self.blocks, tokens))
        if seed is None:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(samples, generator=generator)[:count].sort().values


def samples_of(blocks: Blocks, tokens: int) -> int:
    """Return how many calibration samples have so many tokens."""
    return ceil(tokens / blocks.tokens.shape[1])
