# SPDX-License-Identifier: Apache-2.0
"""What a KV policy is: its settings, what it needs, and one score per cached token.

A policy either chooses tokens (``KVPolicy``) or keeps latents of all of them (``LatentPolicy``).
Shapes used everywhere, for R requests padded to common sizes::

    queries    [R, Hq, Q, D]   after RoPE          positions [R, Q]   index of each query's own key,
    keys       [R, Hkv, T, D]  after RoPE                             -1 for padding
    values     [R, Hkv, T, D]
    observed   [R, H, S]       float32, H = 1 or Hkv; S = T where it is of each token
    scores     [R, H, T]       float32, larger is kept first
    lengths    [R]             valid keys per request; what lies behind is zero

A policy does not decide how much is kept: see ``budget`` and ``layout``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict

from kv_policies.latents.format import Bits, LatentFormat
from kv_policies.layout.base import Layout
from kv_policies.workspace import Heads, Transient

Need = Literal["queries", "keys", "values"]


class NoSettings(BaseModel):
    """The settings of a policy that has none; the base of all others'."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Capabilities:
    """What a policy needs and offers: shown to users, checked before an engine starts.

    Attributes:
        needs: What ``score`` looks at. "queries": the policy observes the attention of prompts.
            "keys", "values": of the segment's tokens. Nothing: positions alone. What is not named
            is not read from the cache. Hidden states cannot be named: vLLM does not give them to
            attention, and tokens found in the prefix cache have none.
        per_head: Each KV head keeps tokens of its own choice.
        needs_profile: Per-layer fractions must come from a profile.
        paper: A link.
        content: What kept blocks hold: "tokens" that were chosen, or "latents" of all.
        counts_sinks: ``observe`` lets attention sinks take their share of the softmax. A policy
            that observes queries without it is refused for a model with sinks.
        caps_logits: ``observe`` caps logits as the model does. A policy without it scores as if
            there were no cap.
    """

    needs: frozenset[Need]
    per_head: bool
    needs_profile: bool
    paper: str
    content: Literal["tokens", "latents"] = "tokens"
    counts_sinks: bool = False
    caps_logits: bool = False

    @property
    def serves_sinks(self) -> bool:
        """Whether scores are right for a model with attention sinks."""
        return self.content == "tokens" and (self.counts_sinks or not self.needs_queries)

    @property
    def needs_queries(self) -> bool:
        """Whether scores come from attention. Such a policy scores decode windows with the queries
        that the engine stores for it: see ``KVPolicy.decode_queries``.
        """
        return "queries" in self.needs


@dataclass(frozen=True)
class Context:
    """What ``score`` may look at: segments of R requests, in one layer.

    A segment is a whole prompt, with its raw tail, or one decode window. Under tensor parallelism
    the heads are those of the rank. Where a long prompt would take too much memory, a policy that
    is ``per_head`` sees some of the heads at a time.

    Attributes:
        layer: Index of the layer in the model; None for decode windows, which are scored for
            several layers at once, each a request's.
        lengths: Valid tokens, int64 [R].
        tokens: T, to which the segments are padded.
        observed: Sum of ``observe`` over the queries of the segment, float32 [R, H, S]; None
            without "queries" in ``needs``.
        keys: [R, Hkv, T, D]; None without "keys" in ``needs``.
        values: [R, Hkv, T, D]; None without "values" in ``needs``.
        kept: Tokens that will stay, without a raw tail, int64 [R].
        scale: Factor on q.k in the softmax of the layers.
    """

    layer: int | None
    lengths: torch.Tensor
    tokens: int
    observed: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    scale: float = 1.0


class Policy(Protocol):
    """What all policies have."""

    name: ClassVar[str]
    settings_type: ClassVar[type[NoSettings]]
    capabilities: ClassVar[Capabilities]
    settings: Any

    def __init__(self, settings: Any) -> None: ...


@runtime_checkable
class KVPolicy(Policy, Protocol):
    """Scores the tokens of a segment. The caller sums ``observe`` over queries, then ``score``s.

    Queries of a prompt are observed from ``first_observed`` on. The sum over any cut of them is the
    same sum. Of a decode window the last ``decode_queries`` are observed, at once.
    """

    @property
    def decode_queries(self) -> int:
        """Last queries of a decode window that are observed, at most ``QUERIES``.

        The engine stores as many for each running request and layer. 0 for a policy with "queries"
        in ``needs``: it leaves decode windows to key_diff.
        """
        ...

    def first_query(self, stop: int) -> int:
        """First prompt position whose query is wanted, of a prompt of ``stop`` tokens."""
        ...

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """What some queries say about the keys. It must be additive over queries.

        Called only with "queries" in ``needs``. The caller takes the mean over the heads for a
        policy that is not ``per_head``, so observe each KV head for itself.

        Args:
            queries: [R, Hq, Q, D].
            positions: [R, Q].
            keys: The segment's keys, at least up to the last query's own.
            scale: Factor on q.k in the softmax.
            sinks: Logits of attention sinks, [Hq] or [R, Hq]; None: there are none. Given only to a
                policy whose capabilities say ``counts_sinks``.
            softcap: Logits x are ``softcap * tanh(x / softcap)`` before the softmax; None: there is
                no cap. Given only to a policy whose capabilities say ``caps_logits``.

        Returns:
            float32 [R, Hkv, S]. S is T, or whatever ``observed_numbers`` says.
        """
        ...

    def observed_numbers(self, heads: Heads, tokens: int) -> int:
        """S: the numbers that ``observe`` returns for each request and KV head.

        Args:
            heads: Of the layer, on this rank.
            tokens: T.
        """
        ...

    def score(self, context: Context) -> torch.Tensor:
        """Scores [R, H, T] of the segments' tokens, H = Hkv for a policy that is ``per_head``.

        The scores of a prompt's raw tail are not used: the tail stays.
        """
        ...

    def transient(self, heads: Heads) -> Transient:
        """Memory that ``observe`` and ``score`` take beside their arguments and results.

        A test measures it. What it says is kept out of the KV cache, and decides how many requests
        and heads are worked on at a time.
        """
        ...


@runtime_checkable
class LatentPolicy(Policy, Protocol):
    """Keeps every token, as a latent in the bases of a file (``latents.bases``).

    Attributes:
        recent: Last tokens that stay raw.
    """

    @property
    def recent(self) -> int: ...

    def most_tokens(self, elements: int, key_rank: int, value_rank: int, bits: Bits) -> int:
        """Tokens whose latents fit in a block of ``elements`` numbers of 16 bits.

        ``bits`` is of a number of a latent, as the bases say.
        """
        ...

    def form(self, key_rank: int, value_rank: int, bits: Bits, tokens: int) -> LatentFormat:
        """How latents lie in a block that holds ``tokens`` of them."""
        ...


class QueryFreePolicy:
    """Base of the policies that look at no query: ``score`` is all they add."""

    settings_type: ClassVar[type[NoSettings]] = NoSettings
    decode_queries = 0

    def __init__(self, settings: NoSettings) -> None:
        self.settings: Any = settings

    def first_query(self, stop: int) -> int:
        return stop  # none

    def observe(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError("a policy without queries in its needs observes nothing")

    def observed_numbers(self, heads: Heads, tokens: int) -> int:
        return 0

    def transient(self, heads: Heads) -> Transient:
        """Enough for a float32 copy of the keys and two of their norms."""
        return Transient(per_token=4 * heads.size + 16, per_row=16 * heads.size)


def first_observed(policy: KVPolicy, layout: Layout, n: int) -> int:
    """The prompt position from which on queries are observed, of a prompt of n tokens.

    Queries before ``Layout.first_private`` may belong to another request's cached prefix and are
    then not there. Leaving them out always makes scores, and so texts, the same with prefix caching
    on and off. The last query is always observed.
    """
    return min(max(policy.first_query(n), layout.first_private(n)), n - 1)
