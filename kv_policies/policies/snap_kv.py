# SPDX-License-Identifier: Apache-2.0
"""SnapKV: what the end of the prompt attends to, chosen per KV head."""

from typing import ClassVar

import torch
from pydantic import Field

from kv_policies.attention import attention_transient, pooled
from kv_policies.attention_policy import AttentionPolicy, AttentionSettings, decode_queries
from kv_policies.base import Capabilities, Context, NoSettings
from kv_policies.workspace import Heads, Transient


class SnapKVSettings(AttentionSettings):
    """Settings of ``snap_kv``."""

    window: int = Field(
        16,
        ge=1,
        description="last prompt tokens that vote and always stay; larger: steadier votes, less "
        "room for the rest of a short prompt",
    )
    pool: int = Field(
        15,
        ge=1,
        description="tokens of the max pooling, odd; larger: whole phrases stay, fewer of them",
    )
    decode_queries: int = decode_queries(0)


class SnapKV(AttentionPolicy):
    """Keeps the tokens that the last ``window`` queries attend to, with their neighbours.

    SnapKV, Li et al. 2024 (https://arxiv.org/abs/2404.14469). The score is the attention of the
    last queries, mean over the query heads of a KV head, max-pooled along the tokens. The window
    itself stays, its latest tokens first when the budget is smaller. Each KV head makes its own
    choice.

    Pooling is wider than the paper's 7. A number of five digits is five tokens to many tokenizers,
    and the end of a prompt attends to the first of them only.

    Limits: It assumes that the question is at the end of the prompt. What the question of a later
    turn needs may be gone. Decode windows are scored by key_diff.
    """

    name: ClassVar[str] = "snap_kv"
    settings_type: ClassVar[type[NoSettings]] = SnapKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"queries"}),
        per_head=True,
        needs_profile=False,
        paper="https://arxiv.org/abs/2404.14469",
        counts_sinks=True,
        caps_logits=True,
    )

    @property
    def queries(self) -> int:
        return int(self.settings.window)

    def score(self, context: Context) -> torch.Tensor:
        observed = context.observed
        assert observed is not None
        at = torch.arange(context.tokens, device=observed.device)
        recent = at - (context.lengths[:, None, None] - self.settings.window)
        # Votes for the window are not votes for its neighbours in front: they leave the pooling.
        votes = observed.masked_fill(recent >= 0, 0)
        scores = pooled(votes, self.settings.pool)
        return torch.where(recent >= 0, scores.amax(-1, keepdim=True) + 1 + recent, scores)

    def transient(self, heads: Heads) -> Transient:
        pooling = Transient(per_token=48)
        return attention_transient(heads) + pooling
