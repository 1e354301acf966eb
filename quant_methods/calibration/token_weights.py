# SPDX-License-Identifier: Apache-2.0
"""How much each calibration token counts in the statistics of a block."""

from dataclasses import dataclass
from typing import Protocol

import torch

from compress_common.calibration.blocks import Blocks

_TINY = torch.finfo(torch.float32).tiny


class TokenWeights(Protocol):
    """Weighs the tokens of a chunk, before the block runs on them."""

    def __call__(self, blocks: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the weight of each token, fp32 [samples, length], with a mean of 1 per sample.

        Args:
            blocks: The decoder. The block is on the compute device and has its original weights.
                ``blocks.arguments(index)`` are what it is called with.
            index: Of the block.
            hidden: Its input, [samples, length, hidden].
        """
        ...


@torch.no_grad()
def weighed(
    blocks: Blocks, index: int, hidden: torch.Tensor, token_weights: TokenWeights | None
) -> torch.Tensor | None:
    """Return how much each token counts in a resident block, fp32 [samples, length].

    Call it before a linear of the block is replaced: attention of rounded queries and keys gives
    other weights.

    Args:
        blocks: The decoder.
        index: Of the block.
        hidden: Its input, [samples, length, hidden].
        token_weights: What weighs; None: all tokens count alike, and None is returned.
    """
    if token_weights is None:
        return None
    chunks = (hidden[part].to(blocks.device) for part in blocks.chunks(len(hidden)))
    return torch.cat([token_weights(blocks, index, chunk) for chunk in chunks])


def normalized(weights: torch.Tensor) -> torch.Tensor:
    """Return weights [samples, length] with a mean of 1 in each sample.

    The damping of GPTQ is a share of the mean energy, so the mean must not depend on the weights.
    """
    weights = weights.float()
    return weights / weights.mean(-1, keepdim=True).clamp(min=_TINY)


def rescaled(scores: torch.Tensor, least: float, power: int = 1) -> torch.Tensor:
    """Return the weights of tokens by their scores, fp32 [samples, length], with a mean of 1.

    Within a sample the scores are stretched to ``least``..1, and then raised to a power.

    Args:
        scores: [samples, length]; larger: the token counts more.
        least: Weight of the token with the lowest score, as a share of the largest. Above 0, so
            that no token is left out.
        power: 1 or 2.
    """
    low, high = scores.aminmax(dim=-1, keepdim=True)
    share = (scores - low) / (high - low).clamp(min=_TINY)
    return normalized((least + share * (1 - least)).pow(power))


@dataclass(frozen=True)
class ActivationNorm:
    """Tokens whose hidden state has a large norm count more. A control for attention.

    Args:
        least: As in ``rescaled``.
        power: As in ``rescaled``.
    """

    least: float
    power: int = 1

    def __call__(self, blocks: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """See ``TokenWeights``."""
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        return rescaled(norms, self.least, self.power)


@dataclass(frozen=True)
class FirstTokens:
    """Tokens at the start of a sample count more. A control for attention.

    Args:
        share: Of the sample that has the full weight, at least one token.
        least: Weight of the others.
        power: As in ``rescaled``.
    """

    share: float
    least: float
    power: int = 1

    def __call__(self, blocks: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """See ``TokenWeights``."""
        samples, length = hidden.shape[:2]
        scores = torch.zeros(samples, length, device=hidden.device)
        scores[:, : max(1, round(self.share * length))] = 1
        return rescaled(scores, self.least, self.power)
