# SPDX-License-Identifier: Apache-2.0
"""Hessian with inter-layer terms: our reconstruction, as the paper's formula is not public.

Paper: Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
Quantization, https://arxiv.org/abs/2306.04879
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import smallest, total
from quant_methods.calibration.derivatives import Derivatives, derivatives
from quant_methods.calibration.levels import LevelDatabase

_CHECKED = 2  # states after the bisection's result that are measured too


class HessianSettings(AllocatorSettings):
    """Settings of ``hessian``."""

    pairwise: bool = Field(
        False,
        description="true (paper): add the terms between units, which are noisy on few samples; "
        "false: the Fisher diagonal alone",
    )
    loss_bound: float | None = Field(
        None,
        gt=0,
        description="nats per token that may be lost: the smallest model within it, which must "
        "also meet the budget; unset: as many bits as the budget has",
    )
    samples: int = Field(48, ge=1, description="calibration samples of the backward pass")


class Hessian(Allocator):
    """Lower the unit that costs least per bit, again and again, until the budget or a bound is met.

    The cost of a unit is its second-order loss (Fisher diagonal). With ``pairwise``, it also has
    what the error of the unit and those of the units that were lowered before do together: the
    product of their directional derivatives, as a mean over samples. This is our reconstruction:
    the paper gives the idea and the bisection, but no formula. It needs a backward pass.
    ``pairwise`` is off by default: with 48 samples of our demo model, at 3.8 bits, it lost 0.28
    nats on the search's text, the diagonal alone 0.24.
    """

    name: ClassVar[str] = "hessian"
    settings_type: ClassVar[type[AllocatorSettings]] = HessianSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.04879"
    needs: ClassVar[str] = "one backward pass of the 16-bit model, and probes for a bound"

    def __init__(self, settings: HessianSettings) -> None:
        super().__init__(settings)
        self.found = Derivatives()

    def observe(self, blocks: Blocks, database: LevelDatabase, progress: Progress = silent) -> None:
        """Go backward through the model once."""
        super().observe(blocks, database, progress)
        few = blocks.first(min(self.settings.samples, len(blocks.tokens)))
        self.found = derivatives(few, database, progress)

    def allocate(
        self,
        levels: Levels,
        sizes: Levels,
        budget: float,
        probe: Probe,
        progress: Progress = silent,
    ) -> dict[str, int]:
        """See ``Allocator``."""
        smallest(sizes, budget)
        along = self.found.along if self.settings.pairwise else None
        steps = lowering(sizes, self.found.fisher, along)
        states = [{unit: max(costs, key=costs.__getitem__) for unit, costs in sizes.items()}]
        for unit, bits in steps:
            states.append(states[-1] | {unit: bits})
        fits = next(k for k, bits in enumerate(states) if total(sizes, bits) <= budget)
        self.report = {"reconstruction": True, "pairwise": self.settings.pairwise}
        if (bound := self.settings.loss_bound) is None:
            return states[fits]
        losses: dict[int, float] = {}

        def within(count: int) -> bool:
            if count not in losses:
                losses[count] = probe(states[count])
                progress("bisection", len(losses), len(states).bit_length() + 1 + _CHECKED)
            return losses[count] <= bound

        best = _last_within(len(states) - 1, within)
        if best is None:
            raise CompressError(
                f"the highest levels already lose {losses[0]:.4f} nats, more than the loss bound "
                f"of {bound}; raise loss_bound or add a higher level"
            )
        if best < fits:
            raise CompressError(
                f"the loss bound of {bound} nats takes {total(sizes, states[best]) / 8:.0f} bytes, "
                f"above the budget of {budget / 8:.0f} bytes; raise the budget or loss_bound"
            )
        self.report |= {"loss_bound": bound, "loss": losses[best]}
        return states[best]


def _last_within(last: int, within: Any) -> int | None:
    """Return the largest number that is within a bound, by bisection; None: not even 0 is.

    The loss is taken to rise with the number. It is noisy, so the next numbers are tried too.
    """
    if not within(0):
        return None
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if within(middle) else (low, middle - 1)
    more = range(low + 1, min(low + _CHECKED, last) + 1)
    return max((count for count in more if within(count)), default=low)


def lowering(
    sizes: Levels,
    fisher: Mapping[str, Mapping[int, float]],
    along: Mapping[str, Mapping[int, torch.Tensor]] | None,
) -> list[tuple[str, int]]:
    """Return ``(unit, bits)`` steps from the highest level of all units to the lowest.

    Each step is the one that adds least loss per bit of size, given the steps before it.

    Args:
        sizes: Size of each unit at each level.
        fisher: Second-order loss of each unit alone.
        along: Directional derivatives, fp64 [samples]; None: units do not interact.
    """
    order = {unit: sorted(costs, key=costs.__getitem__) for unit, costs in sizes.items()}
    state = {unit: levels.pop() for unit, levels in order.items()}
    together: Any = sum(along[unit][bits] for unit, bits in state.items()) if along else 0.0

    def rate(unit: str, together: Any) -> float:
        now, then = state[unit], order[unit][-1]
        added = fisher[unit][then] - fisher[unit][now]
        if along is not None:
            others = together - along[unit][now]
            added += (others * (along[unit][then] - along[unit][now])).mean().item()
        return added / (sizes[unit][now] - sizes[unit][then])

    steps = []
    while left := {unit: rate(unit, together) for unit, levels in order.items() if levels}:
        unit = min(left, key=left.__getitem__)
        bits = order[unit].pop()
        if along is not None:
            together = together + along[unit][bits] - along[unit][state[unit]]
        state[unit] = bits
        steps.append((unit, bits))
    return steps
