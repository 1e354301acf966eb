# SPDX-License-Identifier: Apache-2.0
"""One-shot KL: drop each block alone, and let the cheapest ones go."""

from typing import ClassVar

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, lowest


class SingleDrop(Search):
    """The KL divergence of the next token without each block.

    It sees what the output loses, and not what two blocks lose together. Its cost: one pass for
    each block, from that block on.
    """

    name: ClassVar[str] = "single_drop"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        costs = ground.single(progress)
        self.report = {"kl_alone": {str(i): round(cost, 6) for i, cost in costs.items()}}
        return lowest(costs, count)
