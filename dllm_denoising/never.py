# SPDX-License-Identifier: Apache-2.0
"""Recompute only what is new or active: the cheapest policy, with the most stale cache."""

from typing import ClassVar

from dllm_denoising.base import Refreshing


class Never(Refreshing):
    """Computes everything in the first step only."""

    name: ClassVar[str] = "never"
    paper: ClassVar[str] = "none; the opposite of full"

    def refreshes(self, step: int) -> bool:
        return False
