# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the original and of the pruned model, side by side."""

from dataclasses import dataclass

import torch

from compress_common.calibration.blocks import Blocks
from depth_pruning.student import run_without


@dataclass
class Pair:
    """The input of one block in both models, [samples, length, hidden] each.

    Attributes:
        original: In the original model.
        pruned: In the pruned one.
    """

    original: torch.Tensor
    pruned: torch.Tensor

    @classmethod
    def at(cls, blocks: Blocks, index: int) -> "Pair":
        """Return the input of a block in front of which nothing has changed."""
        hidden = blocks.inputs()
        before = range(index, len(blocks))
        hidden = run_without(blocks, before, hidden)
        return cls(hidden, hidden.clone())


def token_weights(state: torch.Tensor) -> torch.Tensor:
    """Return how much each token counts in a squared error: the inverse of its mean square.

    Args:
        state: Its hidden state in the original model, [tokens, hidden].

    Returns:
        fp32 [tokens], with a mean of one.
    """
    weights = 1.0 / state.float().square().mean(-1).clamp(min=1e-12)
    return weights / weights.mean()
