# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: per-layer budgets from a profile, tokens by the attention they receive."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from kv_policies.attention import attention_received
from kv_policies.base import Capabilities, NoSettings


class PrefixKVSettings(NoSettings):
    """Settings of ``prefix_kv``."""

    queries: int = Field(
        32,
        ge=0,
        description="at most this many last prompt tokens vote, 0 for all, as in the paper; fewer: "
        "cheaper for long prompts, and closer to snap_kv",
    )


class PrefixKV:
    """Keeps the tokens that received most attention: mean over heads, summed over queries.

    PrefixKV, Wang et al. 2024 (https://arxiv.org/abs/2412.03409). One choice per layer, shared by
    its KV heads; the layer's share comes from a profile made by ``budget.fractions_of``.

    The paper sums over all prompt queries. In an engine with prefix caching the queries of a cached
    prefix do not exist; the sum then runs over those from ``Layout.first_private`` on. ``keep``
    here is what stays (the paper's code configures what is evicted).

    Limits: early tokens are seen by more queries and score higher; the question at the end of a
    prompt counts no more than any other text (``snap_kv`` scores with a profile's sizes do better
    there). All queries would cost about a second pass of attention, so ``queries`` caps them. The
    mean is over the heads it is given, under tensor parallelism those of the rank.
    """

    name: ClassVar[str] = "prefix_kv"
    settings_type: ClassVar[type[NoSettings]] = PrefixKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_queries=True,
        per_head=False,
        needs_profile=True,
        paper="https://arxiv.org/abs/2412.03409",
    )

    def __init__(self, settings: PrefixKVSettings) -> None:
        self.settings: Any = settings

    def first_query(self, stop: int) -> int:
        return max(0, stop - self.settings.queries) if self.settings.queries else 0

    def observe(
        self, queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return attention_received(queries, positions, keys, scale).mean(1, keepdim=True)

    def score(
        self, observed: torch.Tensor | None, keys: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        assert observed is not None
        return observed
