# SPDX-License-Identifier: Apache-2.0
"""The best window: neighboring blocks whose input and output point the same way.

Paper: The Unreasonable Ineffectiveness of the Deeper Layers, https://arxiv.org/abs/2403.17887
"""

from collections.abc import Collection
from typing import ClassVar

import torch

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, TooFewBlocks, check_count


class Window(Search):
    """The window with the least cosine distance from its input to its output.

    One pass in all. The healer ``linear`` was made for it. It does not see what the output of the
    model loses: measured on 8 blocks of a small model, it lost three times what ``greedy`` lost.
    """

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.17887"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        check_count(count, ground.candidates)
        inputs = ground.probe.inputs
        starts = window_starts(ground.candidates, count)
        if not starts:
            raise TooFewBlocks(
                f"there are no {count} neighboring blocks that may go; drop fewer, or give "
                "--search greedy"
            )
        distances = {s: cosine_distance(inputs[s], inputs[s + count]) for s in starts}
        first = min(distances, key=distances.__getitem__)
        self.report = {"distance": {str(i): round(d, 6) for i, d in distances.items()}}
        return tuple(range(first, first + count))


def window_starts(candidates: Collection[int], count: int) -> list[int]:
    """Return the first blocks of all runs of ``count`` neighbors among the candidates."""
    allowed = set(candidates)
    return [start for start in sorted(allowed) if allowed.issuperset(range(start, start + count))]


def cosine_distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return one minus the mean cosine of hidden states of the same tokens, [.., hidden] each."""
    return 1.0 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
