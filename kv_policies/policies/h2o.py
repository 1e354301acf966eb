# SPDX-License-Identifier: Apache-2.0
"""H2O: half of what stays is recent, the other half received most attention."""

from typing import ClassVar

import torch
from pydantic import Field

from kv_policies.attention_policy import AttentionPolicy, AttentionSettings
from kv_policies.base import Capabilities, Context, NoSettings
from kv_policies.workspace import Heads, Transient


class H2OSettings(AttentionSettings):
    """Settings of ``h2o``."""

    queries: int = Field(
        32,
        ge=1,
        description="last tokens whose attention is summed; larger: closer to the paper, which "
        "sums over all, and slower",
    )


class H2O(AttentionPolicy):
    """Keeps the tokens that received most attention in sum, and as many recent ones.

    H2O, Zhang et al. 2023 (https://arxiv.org/abs/2306.14048). Half of the tokens that stay are the
    most recent ones. The others are those that received most attention, summed over queries, mean
    over the query heads of a KV head. Each KV head makes its own choice.

    What differs: The paper adds up attention from the first token of a request on and evicts a
    token per step. Here a segment is scored when it ends, from the queries of its last tokens
    alone, and scores of kept tokens are computed anew each time. A sum over all queries would be
    state of a request, and queries of a prefix that is found in the cache do not exist.

    Limits: Of its own half nothing is pooled, so that of a number some digits can stay.
    """

    name: ClassVar[str] = "h2o"
    settings_type: ClassVar[type[NoSettings]] = H2OSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"queries"}),
        per_head=True,
        needs_profile=False,
        paper="https://arxiv.org/abs/2306.14048",
        counts_sinks=True,
        caps_logits=True,
    )

    def score(self, context: Context) -> torch.Tensor:
        observed, kept = context.observed, context.kept
        assert observed is not None and kept is not None
        at = torch.arange(context.tokens, device=observed.device)
        recent = at - (context.lengths - kept // 2)[:, None, None]
        above = observed.amax(-1, keepdim=True) + 1
        return torch.where(recent >= 0, above + recent, observed)

    def transient(self, heads: Heads) -> Transient:
        return super().transient(heads) + Transient(per_token=32)
