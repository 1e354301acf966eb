# SPDX-License-Identifier: Apache-2.0
"""Block influence: how far a block turns the hidden states.

Paper: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect,
https://arxiv.org/abs/2403.03853
"""

from typing import ClassVar

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, lowest
from depth_pruning.searches.window import cosine_distance


class BlockInfluence(Search):
    """One minus the mean cosine of a block's input and output. One pass in all."""

    name: ClassVar[str] = "block_influence"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        inputs = ground.probe.inputs
        found = {i: cosine_distance(inputs[i], inputs[i + 1]) for i in ground.candidates}
        self.report = {"influence": {str(i): round(value, 6) for i, value in found.items()}}
        return lowest(found, count)
