# SPDX-License-Identifier: Apache-2.0
"""Spend a budget of bits on units: pure functions.

``levels`` and ``sizes`` are ``{unit: {bits: value}}``: the loss of a unit at each of its levels,
and what it takes.
"""

from collections.abc import Mapping
from typing import NamedTuple

from compress_common.errors import CompressError
from quant_methods.allocators.base import Levels


class _Step(NamedTuple):
    """A raise of one unit to another level."""

    unit: str
    bits: int
    cost: float
    rate: float  # what the loss falls by per bit of size


def total(sizes: Levels, bits: Mapping[str, int]) -> float:
    """Return the size of an allocation."""
    return sum(sizes[unit][count] for unit, count in bits.items())


def nearest_level(curve: Mapping[int, float], bits: int) -> int:
    """Return the level of a unit that is nearest to a number of bits; the lower on a tie."""
    return min(curve, key=lambda level: (abs(level - bits), level))


def smallest(sizes: Levels, budget: float) -> dict[str, int]:
    """Return the cheapest level of each unit.

    Raises:
        CompressError: Together they do not fit the budget.
    """
    bits = {unit: min(costs, key=costs.__getitem__) for unit, costs in sizes.items()}
    if (least := total(sizes, bits)) > budget:
        raise CompressError(
            f"the budget of {budget / 8:.0f} bytes is below the {least / 8:.0f} bytes of the "
            "lowest levels; raise the budget or add a lower level"
        )
    return bits


def fill(levels: Levels, sizes: Levels, budget: float) -> dict[str, int]:
    """Return the allocation that lowers the total loss most for its bits, within a budget.

    All units start at their cheapest level. Then the raises with the largest gain per bit are
    taken as long as they fit. Only levels on the lower convex hull of loss over size are used, so
    this is the Lagrangian solution, plus what still fits. The loss never rises with the budget.

    Raises:
        CompressError: The budget is below the cheapest levels.
    """
    bits = smallest(sizes, budget)
    steps = [step for unit in levels for step in _hull(unit, levels[unit], sizes[unit], bits[unit])]
    # Rates fall along the hull of a unit, so its steps stay in order: sorting is stable.
    steps.sort(key=lambda step: step.rate, reverse=True)
    left = budget - total(sizes, bits)
    blocked = set()  # a step that does not fit stops its unit: later ones start from it
    for step in steps:
        if step.unit in blocked:
            continue
        if step.cost > left:
            blocked.add(step.unit)
            continue
        bits[step.unit], left = step.bits, left - step.cost
    return bits


def _hull(
    unit: str, losses: Mapping[int, float], costs: Mapping[int, float], start: int
) -> list[_Step]:
    """Return the raises along the lower convex hull of loss over size, from the cheapest level."""
    steps: list[_Step] = []
    at = start
    while True:
        better = [
            _Step(unit, bits, costs[bits] - costs[at], _rate(losses, costs, at, bits))
            for bits in losses
            if costs[bits] > costs[at] and losses[bits] < losses[at]
        ]
        if not better:
            return steps
        step = max(better, key=lambda step: (step.rate, step.cost))
        if steps and step.rate > steps[-1].rate:  # by a rounding error of three points on a line
            step = step._replace(rate=steps[-1].rate)
        steps.append(step)
        at = step.bits


def _rate(losses: Mapping[int, float], costs: Mapping[int, float], at: int, bits: int) -> float:
    return (losses[at] - losses[bits]) / (costs[bits] - costs[at])
