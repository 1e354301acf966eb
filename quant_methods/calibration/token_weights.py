# SPDX-License-Identifier: Apache-2.0
"""How much each calibration token counts in the statistics of a block."""

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from quant_methods.calibration.blocks import Blocks


class TokenWeights(Protocol):
    """Weighs the tokens of a chunk, before the block runs on them."""

    def __call__(self, blocks: "Blocks", index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the weight of each token, fp32 [samples, length], with a mean of 1 per sample.

        Args:
            blocks: The decoder. The block is on the compute device and has its original weights.
                ``blocks.argument(index, "position_embeddings")`` gives its RoPE.
            index: Of the block.
            hidden: Its input, [samples, length, hidden].
        """
        ...


def normalized(weights: torch.Tensor) -> torch.Tensor:
    """Return weights [samples, length] with a mean of 1 in each sample.

    The damping of GPTQ is a share of the mean energy, so the mean must not depend on the weights.
    """
    weights = weights.float()
    return weights / weights.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
