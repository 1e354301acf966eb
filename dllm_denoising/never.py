# SPDX-License-Identifier: Apache-2.0
"""Never recompute what is neither new nor active: the cheapest, and the most stale."""

from typing import ClassVar

from dllm_denoising.base import Refreshing


class Never(Refreshing):
    """One full step at the start."""

    name: ClassVar[str] = "never"
    paper: ClassVar[str] = "none: the other end of the scale"

    def refreshes(self, step: int) -> bool:
        return False
