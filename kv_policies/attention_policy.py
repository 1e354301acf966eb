# SPDX-License-Identifier: Apache-2.0
"""What the policies have in common that look at the attention of the last tokens."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from kv_policies.attention import attention_received, attention_transient
from kv_policies.base import NoSettings
from kv_policies.workspace import QUERIES, Heads, Transient


def decode_queries(default: int) -> Any:
    """The field of ``AttentionSettings.decode_queries``, with a policy's own default."""
    return Field(
        default,
        ge=0,
        le=QUERIES,
        description="last generated tokens whose queries score a decode window when it ends, 0: "
        "key_diff scores it; larger: steadier votes, more memory for each request that may run",
    )


class AttentionSettings(NoSettings):
    """What the policies that look at attention have in common."""

    decode_queries: int = decode_queries(32)


class AttentionPolicy:
    """Base of the policies that look at the attention of the last ``queries`` tokens."""

    settings_type: ClassVar[type[NoSettings]] = AttentionSettings

    def __init__(self, settings: AttentionSettings) -> None:
        self.settings: Any = settings

    @property
    def queries(self) -> int:
        """Last tokens that vote; 0 for all."""
        return int(self.settings.queries)

    @property
    def decode_queries(self) -> int:
        return int(self.settings.decode_queries)

    def first_query(self, stop: int) -> int:
        return max(0, stop - self.queries) if self.queries else 0

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        return attention_received(queries, positions, keys, scale, sinks, softcap)

    def observed_numbers(self, heads: Heads, tokens: int) -> int:
        return tokens

    def transient(self, heads: Heads) -> Transient:
        return attention_transient(heads)
