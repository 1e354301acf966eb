# SPDX-License-Identifier: Apache-2.0
"""Sink and recent tokens: the baseline that forgets the middle."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from kv_policies.base import Capabilities, Context, NoSettings, QueryFreePolicy
from kv_policies.workspace import Heads, Transient


class RecentSettings(NoSettings):
    """Settings of ``recent``."""

    sinks: int = Field(
        4, ge=0, description="first tokens that always stay; larger: fewer recent ones stay"
    )


class Recent(QueryFreePolicy):
    """Keeps the first ``sinks`` tokens and the most recent ones.

    StreamingLLM, Xiao et al. 2023 (https://arxiv.org/abs/2309.17453), without its renumbering of
    positions. It applies to each segment, so a decode window too keeps its first tokens and its
    last.

    Limits: What lies between is lost, whatever it says. This is the baseline.
    """

    name: ClassVar[str] = "recent"
    settings_type: ClassVar[type[NoSettings]] = RecentSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset(),
        per_head=False,
        needs_profile=False,
        paper="https://arxiv.org/abs/2309.17453",
    )

    def __init__(self, settings: RecentSettings) -> None:
        self.settings: Any = settings

    def score(self, context: Context) -> torch.Tensor:
        lengths = context.lengths
        at = torch.arange(context.tokens, device=lengths.device)
        # Sinks before all others, the very first above all; float32 is exact to 16 M tokens.
        sinks = 2 * lengths[:, None, None] - at
        return torch.where(at < self.settings.sinks, sinks, at).float()

    def transient(self, heads: Heads) -> Transient:
        return Transient(per_token=32)
