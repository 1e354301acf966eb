# SPDX-License-Identifier: Apache-2.0
"""Statistics of what linears get, accumulated over chunks of calibration text."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch


class Collector(ABC):
    """One statistic of the inputs of some linears of a block.

    ``Blocks.run`` feeds it. Memory holds the statistic, never the inputs.

    Args:
        linears: Names of the linears, relative to the block.

    Attributes:
        linears: The same.
        tokens: ``{linear: tokens that were seen}``.
    """

    def __init__(self, linears: Iterable[str]) -> None:
        self.linears = frozenset(linears)
        self.tokens = dict.fromkeys(self.linears, 0)
        self._total: dict[str, torch.Tensor] = {}

    def see(self, linear: str, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Take a chunk of inputs.

        Args:
            linear: Which linear gets them.
            x: fp32 [tokens, K].
            weights: Weight of each token, fp32 [tokens]; None: all equal.
        """
        self.tokens[linear] += len(x)
        self._total[linear] = self.joined(self._total.get(linear), x, weights)

    @abstractmethod
    def joined(
        self, total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Return what stands for all inputs so far.

        Args:
            total: What stood for them before this chunk; None: it is the first. May be changed.
            x: fp32 [tokens, K].
            weights: Weight of each token, fp32 [tokens]; None: all equal.
        """

    def value(self, linear: str) -> torch.Tensor:
        """Return the statistic of one linear."""
        return self._total[linear]


class Maxima(Collector):
    """The largest |input| of each channel, [K]. Token weights do not matter."""

    def joined(
        self, total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See the base class."""
        largest = x.abs().amax(0)
        return largest if total is None else torch.maximum(total, largest)


class Energies(Collector):
    """The mean squared input of each channel, [K]."""

    def joined(
        self, total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See the base class."""
        squares = x.square()
        if weights is not None:
            squares.mul_(weights[:, None])
        energy = squares.sum(0)
        return energy if total is None else total.add_(energy)

    def value(self, linear: str) -> torch.Tensor:
        """Return the mean."""
        return self._total[linear] / self.tokens[linear]


class Grams(Collector):
    """The mean outer product of the inputs, [K, K]: GPTQ's Hessian up to a factor."""

    def joined(
        self, total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See the base class."""
        left = x if weights is None else x * weights[:, None]
        return left.t() @ x if total is None else total.addmm_(left.t(), x)

    def value(self, linear: str) -> torch.Tensor:
        """Return the mean. It takes the place of the sum, so it can be asked for once."""
        return self._total.pop(linear).div_(self.tokens[linear])
