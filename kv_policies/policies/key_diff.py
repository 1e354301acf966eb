# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ most, without looking at any query."""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from kv_policies.base import Capabilities, Context, NoSettings, QueryFreePolicy


class KeyDiffSettings(NoSettings):
    """Settings of ``key_diff``."""

    recent: float = Field(
        0,
        ge=0,
        lt=1,
        description="share of what stays that is the last tokens, as in no paper; larger: text "
        "goes on more fluently, less room for the rest",
    )


class KeyDiff(QueryFreePolicy):
    """Keeps the keys least similar to the mean direction of the segment's keys, per KV head.

    KeyDiff, Park et al. 2025 (https://arxiv.org/abs/2504.15364). The score is minus the cosine
    between a key and the mean of the normalized keys. It needs no queries, so it scores the same
    for any chunking and with any cached prefix, and it scores decode windows too.

    Limits: It does not know what will be asked. Keys are taken after RoPE.
    """

    name: ClassVar[str] = "key_diff"
    settings_type: ClassVar[type[NoSettings]] = KeyDiffSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"keys"}),
        per_head=True,
        needs_profile=False,
        paper="https://arxiv.org/abs/2504.15364",
    )

    def score(self, context: Context) -> torch.Tensor:
        assert context.keys is not None
        keys = context.keys.float()
        norms = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        # The sum of the unit keys has the direction of their mean. Padding is zero, adds nothing.
        anchor = normalize((1 / norms).transpose(-1, -2) @ keys, dim=-1)
        scores = -(keys @ anchor.transpose(-1, -2) / norms).squeeze(-1)  # at most 1
        if not self.settings.recent:
            return scores
        assert context.kept is not None
        count = (context.kept.double() * self.settings.recent).long()
        at = torch.arange(context.tokens, device=scores.device)
        recent = at - (context.lengths - count)[:, None, None]
        return torch.where(recent >= 0, 2 + recent, scores)
