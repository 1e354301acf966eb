# SPDX-License-Identifier: Apache-2.0
"""Macro influence: how far the last hidden states turn without a block.

Paper: FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers,
https://arxiv.org/abs/2411.14507
"""

from functools import partial
from typing import ClassVar

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, lowest
from depth_pruning.searches.window import cosine_distance


class MacroInfluence(Search):
    """One minus the mean cosine of the last hidden states with a block and without it."""

    name: ClassVar[str] = "macro_influence"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14507"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        probe, found = ground.probe, {}

        def turned(index: int) -> float:
            return cosine_distance(probe.inputs[-1], probe.final_without(index))

        for done, index in enumerate(ground.candidates, start=1):
            progress("drop each block alone", done, len(ground.candidates))
            found[index] = ground.stages.number(f"turn {index}", partial(turned, index))
        self.report = {"influence": {str(i): round(value, 6) for i, value in found.items()}}
        return lowest(found, count)
