# SPDX-License-Identifier: Apache-2.0
"""Greedy: drop the block that costs least, then the next one given that it is gone."""

from typing import ClassVar

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, check_count


class Greedy(Search):
    """Adds one block at a time, by the KL divergence of all that are gone.

    It sees what blocks lose together, at one pass for each candidate and each block that goes.
    """

    name: ClassVar[str] = "greedy"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        check_count(count, ground.candidates)
        gone: tuple[int, ...] = ()
        path = []
        for number in range(1, count + 1):
            left = [index for index in ground.candidates if index not in gone]
            costs = {}
            for done, index in enumerate(left, start=1):
                progress(f"greedy, block {number} of {count}", done, len(left))
                costs[index] = ground.cost((*gone, index))
            best = min(costs, key=costs.__getitem__)
            gone = (*gone, best)
            path.append([best, round(costs[best], 6)])
        self.report = {"path": path}
        return tuple(sorted(gone))
