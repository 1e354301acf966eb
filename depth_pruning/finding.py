# SPDX-License-Identifier: Apache-2.0
"""Find the blocks that go and what replaces them, on a loaded model."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from depth_pruning.cutting import ranges
from depth_pruning.healers.base import Healed, Text
from depth_pruning.judge import Judge, Loss
from depth_pruning.probe import DropProbe
from depth_pruning.request import PARTS, PruneRequest
from depth_pruning.searches.base import Ground, TooFewBlocks, checked

DEAR = 1.0  # nats that a block may cost alone


@dataclass
class Found:
    """Blocks that go, what replaces them, and how they were found.

    Attributes:
        dropped: Their indices, in order.
        healed: New weights of blocks that stay.
        report: What users see. JSON-able.
    """

    dropped: tuple[int, ...] = ()
    healed: Healed = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Pruning:
    """Finds the blocks that go, and heals the rest.

    Args:
        blocks: The decoder, with all of the calibration text and the stages of the work.
        request: What is asked for.
        progress: Called as the work advances.
    """

    def __init__(self, blocks: Blocks, request: PruneRequest, progress: Progress = silent) -> None:
        self.request, self.progress, self.stages = request, progress, blocks.stages
        fitted, choosing, judging = parts(blocks.tokens)
        self.fitted = len(fitted)
        self.blocks = blocks.on(torch.cat([fitted, choosing]))
        self.chooser, self.judge = Judge(blocks.on(choosing)), Judge(blocks.on(judging))
        text = request.build_search().settings.text_tokens
        probe = DropProbe(blocks.on(fitted), text, progress)
        inner = tuple(range(1, len(blocks) - 1))
        self.ground = Ground(probe, self._choosing_loss, inner, self.stages)
        self._healed: dict[tuple[int, ...], Healed] = {}

    def run(self) -> Found:
        """Return what goes and what replaces it.

        Raises:
            CompressError: A block costs more than a nat alone, or nothing can go in the bound.
        """
        report: dict[str, Any] = {}
        if self.request.layers is not None:
            dropped = self.request.layers
        elif self.request.drop is not None:
            dropped = self._searched(self.request.drop, report)
        else:
            dropped = self._within(float(self.request.max_loss or 0), report)
        if not dropped:
            return Found(report=report)
        alone = {index: self.ground.cost((index,)) for index in dropped}
        self._check_dear(alone)
        loss, healed = self.loss(dropped), self.healed(dropped)
        report |= {
            "loss": loss.rounded(),
            "loss_without_healing": self._unhealed(dropped).rounded(),
            "kl_alone": {str(index): round(cost, 6) for index, cost in alone.items()},
            "curve": self._curve(alone),
            "heal": {"name": self.request.heal} | self.request.heal_settings,
            "calibration": self.request.calibration.model_dump(),
            "held_out_tokens": len(self.judge.reference.positions),
        }
        return Found(dropped, healed, report)

    def healed(self, dropped: tuple[int, ...]) -> Healed:
        """Return the healed weights of a set of blocks that go."""
        if dropped not in self._healed:
            text = Text(self.blocks, self.fitted, f"heal {ranges(dropped)}")
            self._healed[dropped] = self.request.build_healer().heal(dropped, text, self.progress)
        return self._healed[dropped]

    def loss(self, dropped: tuple[int, ...]) -> Loss:
        """Return what a set loses after healing, on text that neither search nor healer sees."""
        return self._judged("loss", self.judge, dropped, self.healed)

    def _unhealed(self, dropped: tuple[int, ...]) -> Loss:
        """Return what a set loses without healing, on the same text as ``loss``."""
        return self._judged("loss unhealed", self.judge, dropped, lambda _: {})

    def _choosing_loss(self, dropped: tuple[int, ...]) -> float:
        """Return the KL of a set after healing, by which a search may choose."""
        return self._judged("choice", self.chooser, dropped, self.healed).kl

    def _judged(
        self,
        name: str,
        judge: Judge,
        dropped: tuple[int, ...],
        healed: Callable[[tuple[int, ...]], Healed],
    ) -> Loss:
        """Return what a set loses. ``healed`` is called when that is not known yet."""

        def compute() -> dict[str, torch.Tensor]:
            weights = healed(dropped)
            loss = judge(dropped, lambda index: weights.get(index, {}))
            return {"loss": torch.tensor(astuple(loss), dtype=torch.float64)}

        return Loss(*self.stages.tensors(f"{name} {ranges(dropped)}", compute)["loss"].tolist())

    def _searched(self, count: int, report: dict[str, Any]) -> tuple[int, ...]:
        """Return the blocks that the search chooses."""
        search = self.request.build_search()
        chosen = search.choose(count, self.ground, self.progress)
        dropped = checked(chosen, count, self.ground.candidates)
        report["search"] = {"name": self.request.search} | search.report
        return dropped

    def _within(self, bound: float, report: dict[str, Any]) -> tuple[int, ...]:
        """Return the largest set whose loss after healing is within a bound, by bisection."""
        best: tuple[int, ...] = ()
        low, high = 0, self.request.most(len(self.blocks))
        tried: dict[str, dict[str, float]] = {}
        while low < high:
            count = (low + high + 1) // 2
            found: dict[str, Any] = {}
            try:
                dropped = self._searched(count, found)
            except TooFewBlocks:  # the search leaves dear blocks out: no set of so many is cheap
                high = count - 1
                continue
            loss = self.loss(dropped)
            tried[str(count)] = loss.rounded()
            if loss.kl <= bound:
                low, best = count, dropped
                report |= found
            else:
                high = count - 1
        report["tried"] = tried
        if not best:
            least = min((loss["kl"] for loss in tried.values()), default=float("nan"))
            raise CompressError(
                f"no block can go for a loss of {bound:g} nats: the least found was {least:.3g}; "
                "raise --max-loss"
            )
        return best

    def _check_dear(self, alone: dict[int, float]) -> None:
        """Raise CompressError when a block costs too much, unless the user wants it."""
        if self.request.force:
            return
        if dear := {index: cost for index, cost in alone.items() if cost > DEAR}:
            listed = ", ".join(f"block {index} {cost:.2f}" for index, cost in dear.items())
            raise CompressError(
                f"a block may cost {DEAR:g} nat of KL alone, and these cost more: {listed}; leave "
                "them out, drop fewer blocks, or give --force"
            )

    def _curve(self, alone: dict[int, float]) -> list[list[float]]:
        """Return ``[blocks dropped, KL without healing]``, the cheapest blocks first."""
        order = sorted(alone, key=alone.__getitem__)
        sets = [tuple(sorted(order[:count])) for count in range(1, len(order) + 1)]
        return [[0, 0.0], *([len(gone), round(self.ground.cost(gone), 6)] for gone in sets)]


def parts(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut calibration text into what is fitted to, what chooses, and what judges.

    Args:
        tokens: int64 [samples, length], at least ``PARTS`` samples.

    Returns:
        int64 [.., length] each. They have no sample in common.
    """
    place = torch.arange(len(tokens)) % PARTS
    choosing, judging = place == PARTS // 2 - 1, place == PARTS - 1
    return tokens[~(choosing | judging)], tokens[choosing], tokens[judging]
