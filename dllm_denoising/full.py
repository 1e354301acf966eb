# SPDX-License-Identifier: Apache-2.0
"""Recompute everything in every step, without a cache: the control of all other policies."""

from typing import ClassVar

from dllm_denoising.base import Refreshing


class Full(Refreshing):
    """LLaDA as it was published."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.09992"

    def refreshes(self, step: int) -> bool:
        return True
