# SPDX-License-Identifier: Apache-2.0
"""Integers as runs of neighbors, for texts that list layers."""

from collections.abc import Iterable


def consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last number of each run of neighbors, in order.

    Args:
        numbers: Ascending where they form runs: ``0, 1, 2, 4`` gives ``(0, 2), (4, 4)``.
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
