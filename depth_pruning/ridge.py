# SPDX-License-Identifier: Apache-2.0
"""Closed-form ridge regression of a linear's correction, with the ridge chosen on other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass
class Moments:
    """Weighted sums over tokens of a regression ``y = delta @ x``, in fp32.

    Attributes:
        gram: Sum of ``w x x^T``, [K, K].
        cross: Sum of ``w y x^T``, [N, K].
        energy: Sum of ``w |y|^2``.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """Return the sums over no token."""
        return cls(
            torch.zeros(inputs, inputs, device=device), torch.zeros(outputs, inputs, device=device)
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x: What the linear reads, fp32 [tokens, K].
            y: What it should give beyond what it gives, fp32 [tokens, N].
            weights: How much each token counts, fp32 [tokens].
        """
        weighted = x * weights[:, None]
        self.gram.addmm_(weighted.t(), x)
        self.cross.addmm_(y.t(), weighted)
        self.energy += float((y.square().sum(-1) * weights).sum())

    def error(self, delta: torch.Tensor) -> float:
        """Return the squared error that a correction leaves, as a share of that without it."""
        explained = 2 * (delta * self.cross).sum() - ((delta @ self.gram) * delta).sum()
        return 1.0 - float(explained) / max(self.energy, 1e-30)


def solution(moments: Moments, ridge: float) -> torch.Tensor:
    """Return the correction with the least squared error plus ``ridge`` times its own square.

    Args:
        moments: Of the tokens.
        ridge: In units of the mean square of an input channel.

    Returns:
        fp32 [N, K].
    """
    gram = moments.gram.double()
    gram.diagonal().add_(max(ridge * float(gram.diagonal().mean()), 1e-30))
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(moments.cross.double().t(), factor).t().float()


def chosen(
    fitted: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES
) -> tuple[torch.Tensor | None, float]:
    """Return the correction whose ridge leaves the least error on tokens that it was not fitted to.

    Args:
        fitted: Of the tokens that it is fitted to.
        held_out: Of others.
        ridges: To choose from.

    Returns:
        The correction, fp32 [N, K], and its error on the held-out tokens as a share of that without
        it. None and 1 where no ridge lowers it.
    """
    best, least = None, 1.0
    for ridge in ridges:
        try:
            delta = solution(fitted, ridge)
        except torch.linalg.LinAlgError:  # all inputs are zero
            continue
        if (error := held_out.error(delta)) < least:
            best, least = delta, error
    return best, least
