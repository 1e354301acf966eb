# SPDX-License-Identifier: Apache-2.0
"""Measure what dropping blocks costs: the divergence of the model's next-token distribution."""

from collections.abc import Collection
from math import ceil

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.prefix import PrefixProbe
from compress_common.progress import Progress, silent
from depth_pruning.student import run_block, run_without


class DropProbe(PrefixProbe):
    """Drops blocks without healing. Blocks before the first dropped block are not run again.

    Args:
        blocks: The decoder, with calibration tokens.
        tokens: How many of them are used, in whole samples spread over the text; None: all.
        progress: Called for each block of the one pass that is stored.
    """

    def __init__(
        self, blocks: Blocks, tokens: int | None = None, progress: Progress = silent
    ) -> None:
        super().__init__(spread(blocks, tokens), progress)
        self._losses: dict[frozenset[int], float] = {}

    def __call__(
        self, dropped: Collection[int], tokens: int | None = None, seed: int | None = None
    ) -> float:
        """Return the mean KL(original || without some blocks), in nats per token.

        Only values of the same ``tokens`` and ``seed`` can be compared.

        Args:
            dropped: Indices of the blocks.
            tokens: Calibration tokens, rounded up to whole samples; None: all.
            seed: Chooses the samples; None: the first ones.
        """
        key = frozenset(dropped)
        whole = self.takes_all(tokens)
        if whole and key in self._losses:
            return self._losses[key]
        if not key:
            return 0.0

        def step(index: int, hidden: torch.Tensor) -> torch.Tensor:
            return hidden if index in key else run_block(self.blocks, index, hidden)

        loss = self.loss(min(key), step, tokens, seed)
        if whole:
            self._losses[key] = loss
        return loss

    def final_without(self, index: int) -> torch.Tensor:
        """Return the last block's output without one block, [samples, length, hidden]."""
        hidden = self.inputs[index].clone()
        return run_without(self.blocks, (index,), hidden, first=index + 1)


def samples_for(tokens: int, length: int) -> int:
    """Return how many samples of a length have so many tokens or more."""
    return ceil(tokens / length)


def spread(blocks: Blocks, tokens: int | None) -> Blocks:
    """Return the blocks on some samples, evenly spread over the calibration text.

    Args:
        blocks: With all of it.
        tokens: How many tokens, rounded up to whole samples; None: all.
    """
    samples, length = blocks.tokens.shape
    wanted = samples if tokens is None else samples_for(tokens, length)
    if wanted >= samples:
        return blocks
    chosen = torch.linspace(0, samples - 1, wanted).long()
    return blocks.on(blocks.tokens[chosen])
