# SPDX-License-Identifier: Apache-2.0
"""KL probe: measure what each unit alone costs the model's output, then spend the budget."""

from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import fill, nearest_level
from quant_methods.calibration.levels import LevelDatabase


class KLProbeSettings(AllocatorSettings):
    """Settings of ``probe``."""

    bits: int = Field(
        3, ge=2, le=8, description="level of the probe; the nearest level that there is"
    )
    tokens: int = Field(384, ge=16, description="calibration tokens of a probe; more: steadier")


class KLProbe(Allocator):
    """One forward probe per unit, at one level. The curve over levels is that of the unit's loss.

    A level whose kernel rounds activations too is probed by itself: the curve knows weights alone.
    Effects of units are taken to add up. No backward pass. Its cost: a pass over ``tokens`` tokens
    for each probe, from the unit's block on.

    Attributes:
        rounding_inputs: Levels whose kernel rounds activations.
    """

    name: ClassVar[str] = "probe"
    settings_type: ClassVar[type[AllocatorSettings]] = KLProbeSettings
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "one probe per unit and level"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.rounding_inputs: frozenset[int] = frozenset()

    def observe(self, blocks: Blocks, database: LevelDatabase, progress: Progress = silent) -> None:
        """See ``Allocator``."""
        super().observe(blocks, database, progress)
        self.rounding_inputs = database.rounding_inputs

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
        for done, (unit, whole) in enumerate(levels.items(), start=1):
            progress("probe", done, len(levels))
            curve = {b: loss for b, loss in whole.items() if b not in self.rounding_inputs} or whole
            at = nearest_level(curve, self.settings.bits)
            cost = self._cost(probe, unit, at)
            losses[unit] = {b: cost * loss / max(curve[at], 1e-30) for b, loss in curve.items()}
            losses[unit] |= {b: self._cost(probe, unit, b) for b in whole.keys() - curve.keys()}
        return fill(losses, sizes, budget)

    def _cost(self, probe: Probe, unit: str, bits: int) -> float:
        """Return what a unit alone costs at a level."""
        tokens = self.settings.tokens
        name = f"probe {tokens} {bits} {unit}"
        return max(self.stages.number(name, partial(probe, {unit: bits}, tokens)), 0.0)
