# SPDX-License-Identifier: Apache-2.0
"""KL probe: measure what each unit alone costs the model's output, then spend the budget."""

from functools import partial
from typing import ClassVar

from pydantic import Field

from compress_common.progress import Progress, silent
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import fill, nearest_level


class KLProbeSettings(AllocatorSettings):
    """Settings of ``probe``."""

    bits: int = Field(
        3, ge=2, le=8, description="level of the probe; the nearest level that there is"
    )
    tokens: int = Field(384, ge=16, description="calibration tokens of a probe; more: steadier")


class KLProbe(Allocator):
    """One forward probe per unit, at one level. The curve over levels is that of the unit's loss.

    Effects of units are taken to add up. No backward pass. Its cost: a pass over ``tokens`` tokens
    for each unit, from the unit's block on.
    """

    name: ClassVar[str] = "probe"
    settings_type: ClassVar[type[AllocatorSettings]] = KLProbeSettings
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "one probe per unit and level"

    def allocate(
        self,
        levels: Levels,
        sizes: Levels,
        budget: float,
        probe: Probe,
        progress: Progress = silent,
    ) -> dict[str, int]:
        """See ``Allocator``."""
        losses = {}
        for done, (unit, curve) in enumerate(levels.items(), start=1):
            progress("probe", done, len(levels))
            at = nearest_level(curve, self.settings.bits)
            cost = self.stages.number(
                f"probe {self.settings.tokens} {at} {unit}",
                partial(probe, {unit: at}, self.settings.tokens),
            )
            cost = max(cost, 0.0)
            losses[unit] = {b: cost * loss / max(curve[at], 1e-30) for b, loss in curve.items()}
        return fill(losses, sizes, budget)
