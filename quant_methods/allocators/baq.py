# SPDX-License-Identifier: Apache-2.0
"""BAQ: bits by the equal-loss rule, here per fused unit.

Paper: BAQ: Efficient Bit Allocation Quantization for Large Language Models,
https://arxiv.org/abs/2506.05664
"""

from collections.abc import Mapping
from math import log2
from typing import ClassVar

from pydantic import Field

from compress_common.progress import Progress, silent
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import nearest_level, smallest, total


class BAQSettings(AllocatorSettings):
    """Settings of ``baq``."""

    bits: int = Field(3, ge=2, le=8, description="level at which the loss of each unit is taken")
    theta: float = Field(
        1.95, gt=0, le=4, description="the loss falls by 2^theta per bit; 2 in theory, paper: 1.95"
    )


class BAQ(Allocator):
    """Give each unit ``r + log2(loss) / theta`` bits, so that all lose the same.

    The paper allocates the columns of one matrix, which no kernel serves. Here the rule is applied
    to units, and the offset ``r`` is the largest whose rounded levels meet the budget. Losses of
    different matrices are not commensurable, so ``probe`` is better on most models.
    """

    name: ClassVar[str] = "baq"
    settings_type: ClassVar[type[AllocatorSettings]] = BAQSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05664"

    def allocate(
        self,
        levels: Levels,
        sizes: Levels,
        budget: float,
        probe: Probe,
        progress: Progress = silent,
    ) -> dict[str, int]:
        """See ``Allocator``. The probe is not used."""
        wanted = {unit: self._relative_bits(curve) for unit, curve in levels.items()}
        # The levels change at finitely many offsets: where a unit crosses the middle of two levels.
        offsets = sorted(
            {
                (low + high) / 2 - wanted[unit]
                for unit, curve in levels.items()
                for low, high in zip(sorted(curve), sorted(curve)[1:], strict=False)
            }
        )
        best = smallest(sizes, budget)
        first, last = 0, len(offsets)
        while first < last:  # the size rises with the offset
            middle = (first + last) // 2
            bits = _nearest(levels, wanted, offsets[middle])
            if total(sizes, bits) <= budget:
                best, first = bits, middle + 1
            else:
                last = middle
        return best

    def _relative_bits(self, curve: Mapping[int, float]) -> float:
        at = nearest_level(curve, self.settings.bits)
        return at + log2(max(curve[at], 1e-30)) / self.settings.theta


def _nearest(levels: Levels, wanted: dict[str, float], offset: float) -> dict[str, int]:
    """Return the level of each unit that is nearest to what the rule gives; the higher on a tie."""
    return {
        unit: min(curve, key=lambda bits: (round(abs(bits - wanted[unit] - offset), 9), -bits))
        for unit, curve in levels.items()
    }
