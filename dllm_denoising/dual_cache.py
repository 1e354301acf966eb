# SPDX-License-Identifier: Apache-2.0
"""Recompute everything when a block begins, and then only that block."""

from typing import ClassVar

import numpy as np

from dllm_denoising.base import Plan, Refreshing, current_block
from dllm_denoising.canvas import Canvas
from dllm_denoising.schedule import Blocks, Schedule


class DualCache(Refreshing):
    """The dual cache of Fast-dLLM, which caches what lies before and behind the current block.

    A step computes the whole block, committed tokens included.
    """

    name: ClassVar[str] = "dual_cache"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22618"
    blocks_only: ClassVar[bool] = True
    _first = -1  # position of the block of the last step

    def plan(self, canvas: Canvas, schedule: Schedule, new: np.ndarray, layers: int) -> Plan:
        assert isinstance(schedule, Blocks)
        active = schedule.active(canvas)
        block = current_block(canvas, schedule, active)
        begins, self._first = int(block[0]) != self._first, int(block[0])
        if begins:
            return Plan(np.arange(len(canvas)), 0, active)
        return Plan(block, layers, active)
