# SPDX-License-Identifier: Apache-2.0
"""Run a decoder without some of its blocks, and with other weights in the rest."""

from collections.abc import Callable, Collection, Mapping

import torch

from compress_common.calibration.blocks import Blocks

Weights = Mapping[str, torch.Tensor]  # {linear of a block: weight}


def run_block(
    blocks: Blocks, index: int, hidden: torch.Tensor, weights: Weights | None = None
) -> torch.Tensor:
    """Return the output of a block, which takes the place of its input.

    Args:
        blocks: The decoder.
        index: Of the block.
        hidden: Its input, [samples, length, hidden]. Overwritten.
        weights: In place of the block's own.
    """
    with blocks.resident(index), blocks.replaced(index, dict(weights or {})):
        return blocks.run(index, hidden, out=hidden)


def run_without(
    blocks: Blocks,
    dropped: Collection[int],
    hidden: torch.Tensor,
    *,
    first: int = 0,
    weights: Callable[[int], Weights] | None = None,
) -> torch.Tensor:
    """Return the output of the last block of a decoder that lacks some blocks.

    Args:
        blocks: The decoder.
        dropped: Indices of the blocks that it lacks.
        hidden: Input of block ``first``, [samples, length, hidden]. Overwritten.
        first: Where to begin.
        weights: Returns what is replaced in a block.
    """
    for index in range(first, len(blocks)):
        if index not in dropped:
            hidden = run_block(blocks, index, hidden, weights(index) if weights else None)
    return hidden
