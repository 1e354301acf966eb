# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: per-layer budgets from a profile, tokens by the attention they receive."""

from typing import ClassVar

import torch
from pydantic import Field

from kv_policies.attention import pooled
from kv_policies.attention_policy import AttentionPolicy, AttentionSettings, decode_queries
from kv_policies.base import Capabilities, Context, NoSettings
from kv_policies.workspace import Heads, Transient


class PrefixKVSettings(AttentionSettings):
    """Settings of ``prefix_kv``."""

    queries: int = Field(
        32,
        ge=0,
        description="at most this many last prompt tokens vote, 0 for all, as in the paper; fewer: "
        "cheaper for long prompts, and closer to snap_kv",
    )
    pool: int = Field(
        15,
        ge=1,
        description="tokens of the max pooling, odd, 1 for none, as in the paper; larger: whole "
        "phrases stay, fewer of them. 1 is better for what single tokens say, as in pictures",
    )
    decode_queries: int = decode_queries(0)


class PrefixKV(AttentionPolicy):
    """Keeps the tokens that received most attention: mean over heads, summed over queries, pooled.

    PrefixKV, Wang et al. 2024 (https://arxiv.org/abs/2412.03409). The KV heads of a layer share one
    choice. The layer's share comes from a profile made by ``budget.levels.fractions_of``.

    The paper sums over all prompt queries. In an engine with prefix caching the queries of a cached
    prefix do not exist, so the sum runs over those from ``Layout.first_private`` on. ``keep`` is
    what stays; the paper's code configures what is evicted.

    The paper does not pool. Single tokens of a number receive attention, and without its other
    tokens the number is lost: on text this finds a third of single facts at a quarter of the cache,
    and with max pooling along the tokens, as in ``snap_kv``, all of them. Shares per layer are not
    touched. ``pool: 1`` with ``queries: 0`` is the paper's score.

    Limits: Early tokens are seen by more queries and score higher. The question at the end of a
    prompt counts no more than any other text; the scores of ``snap_kv`` with the sizes of a profile
    do better there. All queries would cost about a second pass of attention, so ``queries`` caps
    them. Under tensor parallelism the mean is over the heads of the rank. Decode windows are scored
    by key_diff.
    """

    name: ClassVar[str] = "prefix_kv"
    settings_type: ClassVar[type[NoSettings]] = PrefixKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"queries"}),
        per_head=False,
        needs_profile=True,
        paper="https://arxiv.org/abs/2412.03409",
        counts_sinks=True,
        caps_logits=True,
    )

    def score(self, context: Context) -> torch.Tensor:
        assert context.observed is not None
        pool = self.settings.pool
        return context.observed if pool == 1 else pooled(context.observed, pool)

    def transient(self, heads: Heads) -> Transient:
        return super().transient(heads) + Transient(per_token=48 if self.settings.pool > 1 else 0)
