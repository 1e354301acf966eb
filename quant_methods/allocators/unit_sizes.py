# SPDX-License-Identifier: Apache-2.0
"""Stored bits of the units of a model, from its config alone."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from compress_common.structure.derive import structure_of
from quant_methods.allocators.budget import total
from quant_methods.base import GridSettings
from quant_methods.grid import SIXTEEN, Grid


class UnitSizes:
    """What the units of a decoder take.

    Args:
        sizes: ``{unit: {bits: stored bits}}`` of the units that can be quantized, scales and zero
            points included.
        weights: Weights of all units.
        left: Those of units that stay at 16 bits.
    """

    def __init__(self, sizes: dict[str, dict[int, float]], weights: int, left: int) -> None:
        self.sizes = sizes
        self.weights = weights
        self.left = left

    @classmethod
    def counted(
        cls, grids: Mapping[str, Grid], settings: GridSettings, levels: Iterable[int], config: Any
    ) -> Self:
        """Count the units of a model.

        Args:
            grids: ``{linear: grid}`` of what can be quantized; group sizes are taken from it.
            settings: Say what the grid of a level is.
            levels: Bits that a unit may have.
            config: The text model's ``transformers`` config.
        """
        structure, levels = structure_of(config), tuple(levels)
        sizes: dict[str, dict[int, float]] = {}
        weights = left = 0
        for unit, linears in structure.all_units.items():
            for name in linears:
                outputs, inputs = structure.shape(name)
                weights += outputs * inputs
                if name not in grids:
                    left += outputs * inputs
                    continue
                costs = sizes.setdefault(unit, dict.fromkeys(levels, 0.0))
                for bits in levels:
                    stored = float(SIXTEEN)
                    if bits != SIXTEEN:
                        level = settings.grid(bits, grids[name].group_size)
                        stored = level.stored_bits(inputs)
                    costs[bits] += round(stored * outputs * inputs)
        return cls(sizes, weights, left)

    def budget(self, bits_per_weight: float) -> float:
        """Return the stored bits that are left for the units in ``sizes``."""
        return bits_per_weight * self.weights - SIXTEEN * self.left

    def bits_per_weight(self, bits: Mapping[str, int]) -> float:
        """Return the stored bits per weight of an allocation."""
        return (total(self.sizes, bits) + SIXTEEN * self.left) / self.weights

    def lowest(self) -> float:
        """Return the bits per weight of the cheapest levels."""
        return self.bits_per_weight(
            {unit: min(costs, key=costs.__getitem__) for unit, costs in self.sizes.items()}
        )
