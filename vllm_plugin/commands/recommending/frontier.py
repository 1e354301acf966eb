# SPDX-License-Identifier: Apache-2.0
"""The choice among settings by loss and bytes. Imports nothing large."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A setting that can be served.

    Attributes:
        name: what it is called.
        needs: bytes of a device that it takes for the requests that are asked for.
        loss: nats per token above the uncompressed model.
        error: standard error of the loss.
        forgets: it recalls fewer keys than the full cache, by more than one standard error.
    """

    name: str
    needs: int
    loss: float
    error: float = 0.0
    forgets: bool = False

    @property
    def risk(self) -> tuple[bool, float]:
        """What it is ordered by, the safest first: keys that are lost count before nats."""
        return self.forgets, self.loss


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that no other beats in both bytes and safety, the smallest first.

    Each is safer than all that are smaller.
    """
    chain: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.needs, each.risk)):
        if not chain or candidate.risk < chain[-1].risk:
            chain.append(candidate)
    return chain


def choose(chain: Sequence[Candidate], memory: int) -> int | None:
    """Return the index of the candidate to take, or None if none fits.

    It is the safest one that fits. Smaller ones whose loss is within their own standard error of
    its loss count as equally safe, and the smallest of these is taken. More memory never leads to a
    smaller or a less safe choice.

    Args:
        chain: of ``frontier``.
        memory: bytes of the device.
    """
    fitting = [each for each in chain if each.needs <= memory]
    if not fitting:
        return None
    safest = fitting[-1]
    return next(
        index
        for index, each in enumerate(fitting)
        if each.forgets == safest.forgets and each.loss - each.error <= safest.loss
    )
