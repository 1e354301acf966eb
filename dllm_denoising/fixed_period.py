# SPDX-License-Identifier: Apache-2.0
"""Recompute everything in every n-th step."""

from typing import ClassVar

from pydantic import Field

from dllm_denoising.base import NoSettings, Refreshing


class FixedPeriodSettings(NoSettings):
    period: int = Field(
        4, ge=1, description="steps from one refresh to the next; larger: cheaper, more stale"
    )


class FixedPeriod(Refreshing):
    """A refresh after a fixed number of steps, as in dKV-Cache."""

    name: ClassVar[str] = "fixed_period"
    settings_type: ClassVar[type[NoSettings]] = FixedPeriodSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.15781"

    def refreshes(self, step: int) -> bool:
        return step % self.settings.period == 0
