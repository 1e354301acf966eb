# SPDX-License-Identifier: Apache-2.0
"""What a pruned model loses on some calibration text that its weights are not fitted to."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import NextTokenReference, logits_of
from depth_pruning.student import Weights, run_without

_POSITIONS = 1024
_AT_ONCE = 256  # positions whose whole vocabulary is in memory


@dataclass(frozen=True)
class Loss:
    """What is lost per token, in nats.

    Attributes:
        kl: KL(original || pruned) of the next token.
        nats: Rise of the negative log-likelihood of the text.
        nats_error: Standard error of ``nats``, over tokens.
    """

    kl: float
    nats: float
    nats_error: float = 0.0

    def rounded(self) -> dict[str, float]:
        """Return it as reports have it."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


class Judge:
    """Compares a pruned model with the original.

    Args:
        blocks: The decoder, with the tokens to compare on.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        final = run_without(blocks, (), blocks.inputs())
        model, structure = blocks.model, blocks.structure
        self.reference = NextTokenReference(model, structure, final, _POSITIONS)
        self.logits = logits_of(model, structure)
        self.nats = self._nats(final)

    def __call__(
        self, dropped: Collection[int], weights: Callable[[int], Weights] | None = None
    ) -> Loss:
        """Return the loss of a model without some blocks.

        Args:
            dropped: Their indices.
            weights: Returns what is replaced in a block that stays.
        """
        if not dropped:
            return Loss(0.0, 0.0)
        final = run_without(self.blocks, dropped, self.blocks.inputs(), weights=weights)
        risen = self._nats(final) - self.nats
        error = risen.std().item() / len(risen) ** 0.5
        return Loss(self.reference.divergence(final), risen.mean().item(), error)

    @torch.no_grad()
    def _nats(self, final: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood of the next token at some positions, [positions]."""
        length = final.shape[1]
        places = self.reference.positions
        places = places[places % length != length - 1]  # the last one of a sample has no next
        rows = final.flatten(0, 1)[places.to(final.device)].to(self.reference.device)
        wanted = self.blocks.tokens.flatten()[places + 1].to(rows.device)
        parts = zip(rows.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True)
        found = [
            torch.log_softmax(self.logits(row), -1).gather(-1, token[:, None])
            for row, token in parts
        ]
        return -torch.cat(found).flatten().double()
