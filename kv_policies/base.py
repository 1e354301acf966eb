# SPDX-License-Identifier: Apache-2.0
"""What a KV policy is: its settings, its declared abilities, and one score per cached token.

A policy chooses tokens (``KVPolicy``) or keeps latents of all of them (``cskv``). Shapes used
everywhere, for R requests padded to common sizes::

    queries    [R, Hq, Q, D]   after RoPE          positions [R, Q]   index of each query's own key,
    keys       [R, Hkv, T, D]  after RoPE                             -1 for padding
    observed   [R, H, T]       float32, H = 1 or Hkv
    scores     [R, H, T]       float32, larger is kept first
    lengths    [R]             valid keys per request; what lies behind is zero

How much is kept is not a policy's business: see ``budget`` and ``layout``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict

from kv_policies.layout.base import Layout


class NoSettings(BaseModel):
    """The settings of a policy that has none; the base of all others'."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Capabilities:
    """What a policy needs and offers: shown to users, checked before an engine starts.

    needs_queries: scores come from attention; false means keys or positions alone, so a decode
        window is scored as well as a prompt.
    per_head: each KV head keeps tokens of its own choice.
    needs_profile: per-layer fractions must come from a profile.
    paper: a link.
    content: what kept blocks hold: "tokens" that were chosen, or "latents" of all.
    """

    needs_queries: bool
    per_head: bool
    needs_profile: bool
    paper: str
    content: Literal["tokens", "latents"] = "tokens"


class Policy(Protocol):
    """What all policies have."""

    name: ClassVar[str]
    settings_type: ClassVar[type[NoSettings]]
    capabilities: ClassVar[Capabilities]
    settings: Any

    def __init__(self, settings: Any) -> None: ...


@runtime_checkable
class KVPolicy(Policy, Protocol):
    """Scores the tokens of a segment. The caller sums ``observe`` over the chunks, then ``score``s.

    *The segment's keys* are those of the whole prompt, its raw tail included, or those of one
    decode window. Queries are observed of prompts only, from ``first_observed`` on; the sum over
    any cut of them is the same sum.
    """

    def first_query(self, stop: int) -> int:
        """First prompt position whose query is wanted, of a prompt of ``stop`` tokens."""
        ...

    def observe(
        self, queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """What these queries say about the keys, [R, H, T]; additive over chunks of queries.

        ``keys`` are the segment's, at least up to the last query's own. ``scale`` is the factor on
        q.k before the softmax.
        """
        ...

    def score(
        self, observed: torch.Tensor | None, keys: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Scores [R, H, T] of the segment's keys; ``observed`` is the sum over its queries.

        Those of a prompt's raw tail are not used: ``select`` gets the length without it.
        """
        ...


class QueryFreePolicy:
    """Base of the policies that look at keys and positions only: ``score`` is all they add."""

    settings_type: ClassVar[type[NoSettings]] = NoSettings

    def __init__(self, settings: NoSettings) -> None:
        self.settings: Any = settings

    def first_query(self, stop: int) -> int:
        return stop  # none

    def observe(
        self, queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> None:
        return None


def first_observed(policy: KVPolicy, layout: Layout, n: int) -> int:
    """The prompt position from which on queries are observed, of a prompt of n tokens.

    Queries before ``Layout.first_private`` may belong to another request's cached prefix and are
    then not there; leaving them out always makes scores, and so texts, the same with prefix caching
    on and off. Decode windows are scored without queries: see ``compaction.window_policy``.
    """
    return max(policy.first_query(n), layout.first_private(n))
