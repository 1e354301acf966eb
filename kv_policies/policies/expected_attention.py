# SPDX-License-Identifier: Apache-2.0
"""Expected Attention: what queries like the recent ones will attend to."""

from typing import ClassVar

import torch
from pydantic import Field

from kv_policies.attention_policy import AttentionPolicy, AttentionSettings
from kv_policies.base import Capabilities, Context, NoSettings
from kv_policies.workspace import QUERIES, Heads, Transient


class ExpectedAttentionSettings(AttentionSettings):
    """Settings of ``expected_attention``."""

    queries: int = Field(
        32,
        ge=2,
        description="last tokens whose queries are described by mean and covariance; larger: "
        "steadier, less of what was asked last",
    )
    sinks: int = Field(4, ge=0, description="first tokens that always stay")


class ExpectedAttention(AttentionPolicy):
    """Keeps the tokens that queries drawn like the recent ones attend to, weighted by their values.

    Expected Attention, Devoto et al. 2025 (https://arxiv.org/abs/2510.00636). Queries of a head are
    taken for a Gaussian of mean m and covariance C. A key k then expects the unnormalized attention
    ``exp(m.k * scale + k'Ck * scale^2 / 2)``. This is normalized over the tokens, averaged over the
    query heads of a KV head and multiplied by the length of the value. No query ever meets a key.

    What differs: The paper takes all queries of a prompt before RoPE, and rotates their mean and
    covariance to the next 512 positions on average. Attention gets queries after RoPE, and those
    of a cached prefix do not exist. So here the Gaussian is of the last ``queries`` tokens at their
    own positions.

    Limits: A Gaussian knows no two kinds of queries. A soft cap on logits (Gemma 2) is not in the
    expected attention. A head of D channels takes D * D numbers per
    query head of a prompt that is not complete.
    """

    name: ClassVar[str] = "expected_attention"
    settings_type: ClassVar[type[NoSettings]] = ExpectedAttentionSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"queries", "keys", "values"}),
        per_head=True,
        needs_profile=False,
        paper="https://arxiv.org/abs/2510.00636",
    )

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Count, sum and sum of outer products of the queries of each query head."""
        assert sinks is None and softcap is None, "its expected attention has no place for them"
        real = (positions >= 0)[:, None, None, :, None]
        grouped = queries.float().unflatten(1, (keys.shape[1], -1))
        grouped = torch.where(real, grouped, 0)
        count = real.sum(3).expand(*grouped.shape[:3], 1)
        outer = grouped.transpose(-1, -2) @ grouped
        return torch.cat((count, grouped.sum(3), outer.flatten(3)), -1).flatten(2)

    def observed_numbers(self, heads: Heads, tokens: int) -> int:
        return heads.group * (1 + heads.size + heads.size**2)

    def score(self, context: Context) -> torch.Tensor:
        observed, keys, values = context.observed, context.keys, context.values
        assert observed is not None and keys is not None and values is not None
        keys, size, scale = keys.float(), keys.shape[-1], context.scale
        at = torch.arange(context.tokens, device=keys.device)
        hidden = at >= context.lengths[:, None, None]
        expected = keys.new_zeros(keys.shape[:3])
        moments = observed.unflatten(2, (-1, 1 + size + size**2))
        for head in moments.unbind(2):  # [R, Hkv, numbers] of each query head of a group
            count, total, outer = head.split((1, size, size**2), -1)
            mean = (total / count).unsqueeze(-1)
            covariance = outer.unflatten(-1, (size, size)) / count.unsqueeze(-1)
            covariance = covariance - mean @ mean.transpose(-1, -2)
            logits = (keys @ mean).squeeze(-1) * scale
            logits += ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
            expected += logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        expected *= values.float().norm(dim=-1)
        return torch.where(at < self.settings.sinks, expected.amax(-1, keepdim=True), expected)

    def transient(self, heads: Heads) -> Transient:
        numbers = 4 * (1 + heads.size + heads.size**2)
        return Transient(
            per_token=3 * 4 * heads.size + 64,
            per_row=(3 * heads.group + 4) * numbers + QUERIES * heads.group * 12 * heads.size,
        )
