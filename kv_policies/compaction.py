# SPDX-License-Identifier: Apache-2.0
"""One compaction: score what a segment holds, choose, and pack it into the segment's last blocks.

``planner.Planner`` says what a step has to do; ``compact`` does it for one layer. Work is cut into
parts that fit a ``Workspace``: some requests, some KV heads.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from kv_policies.base import Context, KVPolicy
from kv_policies.plan import Part, Queries, Work
from kv_policies.select import pack, select
from kv_policies.window_policy import window_policy
from kv_policies.workspace import QUERIES, Heads, Transient, Workspace

ALL = slice(None)  # heads


class Pages(Protocol):
    """K and V of one layer by physical block.

    Reads are copies [R, heads, C * block_size, D] of blocks int64 [R, C]. Writes are whole blocks,
    int64 [M], of content [M, heads, block_size, D]. Both are of some KV heads only, and bit for
    bit: ``key_numbers`` and ``value_numbers`` say what the bits of a quantized cache stand for.
    """

    def keys(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor: ...

    def values(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor: ...

    def write_keys(self, blocks: torch.Tensor, keys: torch.Tensor, heads: slice = ALL) -> None: ...

    def write_values(
        self, blocks: torch.Tensor, values: torch.Tensor, heads: slice = ALL
    ) -> None: ...

    def key_numbers(self, keys: torch.Tensor) -> torch.Tensor: ...

    def value_numbers(self, values: torch.Tensor) -> torch.Tensor: ...


class Observations:
    """What policies saw of prompts that are not complete: per request and layer, [H, T]."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, request: str, layer: str, seen: torch.Tensor, first: bool) -> torch.Tensor:
        """The sum over all chunks so far; ``first`` starts anew (also after a preemption)."""
        if not first:
            before = self._sums.get(request, {}).get(layer)
            if before is None:
                raise RuntimeError(f"request {request}: earlier chunks of its prompt were not seen")
            width = min(before.shape[1], seen.shape[1])  # behind a request's own keys are zeros
            seen[:, :width] += before[:, :width]
        return seen

    def keep(self, request: str, layer: str, total: torch.Tensor) -> None:
        self._sums.setdefault(request, {})[layer] = total

    def forget(self, request: str, layer: str | None = None) -> None:
        """Drop a request, or one layer of it."""
        if layer is None:
            self._sums.pop(request, None)
        elif layers := self._sums.get(request):
            layers.pop(layer, None)
            if not layers:
                del self._sums[request]

    def __len__(self) -> int:
        return len(self._sums)


def workspace(policy: KVPolicy, heads: Heads) -> Workspace:
    """The memory that a step's work on one layer takes, policy included."""
    one = heads.size * heads.itemsize
    needs = policy.capabilities.needs
    read = one * (1 + ("values" in needs))
    # Scores are sorted: 64 bytes. Then tokens are moved: what is read, three copies of it, and the
    # int64 indices of the kept tokens.
    scored = [kind.transient(heads) for kind in (policy, window_policy(policy))]
    return Workspace(
        Transient(
            per_token=max(read + max(x.per_token for x in scored) + 64, 4 * one + 32),
            per_row=max(x.per_row for x in scored) + QUERIES * heads.group * (one + 16),
            fixed=max(x.fixed for x in scored),
        ),
        # One choice for all heads that looks at keys or values has to see those of all heads.
        least_heads=1 if policy.capabilities.per_head or needs <= {"queries"} else heads.kv,
    )


def observed_bytes(policy: KVPolicy, heads: Heads, tokens: int) -> int:
    """Memory that ``Observations`` take for one layer of a prompt that is not complete.

    Args:
        policy: What observes.
        heads: Of the layer, on this rank.
        tokens: Of the prompt, in whole blocks.
    """
    if not policy.capabilities.needs_queries:
        return 0
    numbers = policy.observed_numbers(heads, tokens)
    return 4 * numbers * (heads.kv if policy.capabilities.per_head else 1)


@dataclass(frozen=True)
class Layer:
    """A layer to compact.

    Attributes:
        name: Of the layer, for ``Observations``.
        index: In the model; None where decode windows are compacted.
        pages: Its blocks.
        heads: Its heads on this rank.
        policy: What scores it.
        space: What bounds a part.
        observations: What was seen of prompts that are not complete.
        scale: Factor on q.k in the softmax.
        recent: ``RecentQueries.stored``; None where decode windows are scored without queries.
        first_recent: The layer's first place there.
        sinks: Logits of attention sinks, [Hq], or [R, Hq] where rows are of several layers; None:
            there are none.
        softcap: Of the logits in the softmax; None: there is no cap.
    """

    name: str
    index: int | None
    pages: Pages
    heads: Heads
    policy: KVPolicy
    space: Workspace
    observations: Observations
    scale: float = 1.0
    recent: torch.Tensor | None = None
    first_recent: int = 0
    sinks: torch.Tensor | None = None
    softcap: float | None = None


def compact(work: Work, layer: Layer, query: torch.Tensor) -> None:
    """Do a step's work on one layer, after its attention: observe, choose, pack.

    Args:
        work: What to do.
        layer: Where.
        query: After RoPE, of all tokens of the step, [tokens, Hq, D].
    """
    for part in work.prompts:
        compact_part(part, layer, layer.policy, query)
    for part in work.windows:
        compact_part(part, replace(layer, index=None), window_policy(layer.policy))


def compact_part(
    part: Part,
    layer: Layer,
    policy: KVPolicy,
    query: torch.Tensor | None = None,
) -> None:
    """Do one part of the work, as ``compact``; ``query`` None for decode windows."""
    slices = layer.space.heads(len(part.present), part.tokens, layer.heads.kv)
    per_head, needs = policy.capabilities.per_head, policy.capabilities.needs
    observed = keys = None
    if part.queries is not None or part.recent is not None:
        seen = []
        for heads in slices:
            keys = _zeroed(layer.pages.keys(part.blocks, heads), part)
            numbers = layer.pages.key_numbers(keys)
            if part.queries is None:
                seen.append(_observe_recent(policy, part, numbers, heads, layer))
            else:
                assert query is not None
                seen.append(_observe(policy, part.queries, numbers, query, heads, layer))
            del numbers
        observed = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
        observed = observed if per_head else observed.mean(1, keepdim=True)
        if part.queries is not None:
            _sum_up(observed, part, layer)
    if part.choice is None:
        return
    for scored in slices if per_head else [slice(0, layer.heads.kv)]:
        if len(slices) > 1:
            keys = None  # of other heads
        if keys is None and "keys" in needs:
            keys = _zeroed(layer.pages.keys(part.blocks, scored), part)
        values = None
        if "values" in needs:
            values = _zeroed(layer.pages.values(part.blocks, scored), part)
            values = layer.pages.value_numbers(values)
        seen_here = observed if observed is None or not per_head else observed[:, scored]
        seen_keys = None
        if keys is not None and "keys" in needs:
            seen_keys = layer.pages.key_numbers(keys)
        choosable, kept, most, *_ = part.choice
        context = Context(
            layer.index,
            part.lengths,
            part.tokens,
            seen_here,
            seen_keys,
            values,
            kept,
            layer.scale,
        )
        chosen = select(policy.score(context), choosable, kept, most)
        del context, seen_keys, values
        for heads in [scored] if per_head else slices:
            if keys is None:
                keys = layer.pages.keys(part.blocks, heads)
            layer.pages.write_keys(part.choice.destination, _moved(keys, chosen, part), heads)
            keys = None
            moved = _moved(layer.pages.values(part.blocks, heads), chosen, part)
            layer.pages.write_values(part.choice.destination, moved, heads)
            del moved


def _observe(
    policy: KVPolicy,
    queries: Queries,
    keys: torch.Tensor,
    query: torch.Tensor,
    heads: slice,
    layer: Layer,
) -> torch.Tensor:
    """What the queries of some KV heads say, [R, heads, S]."""
    of_heads = query[:, _query_heads(heads, layer)]
    total = None
    for first in range(0, queries.tokens.shape[1], QUERIES):
        some = slice(first, first + QUERIES)
        wanted = of_heads[queries.tokens[:, some]].transpose(1, 2)
        at = queries.positions[:, some]
        seen = policy.observe(wanted, at, keys, layer.scale, **_softmax(policy, heads, layer))
        total = seen if total is None else total.add_(seen)
    assert total is not None
    return total


def _observe_recent(
    policy: KVPolicy, part: Part, keys: torch.Tensor, heads: slice, layer: Layer
) -> torch.Tensor:
    """What the last queries of decode windows say, [R, heads, S]."""
    assert part.recent is not None and layer.recent is not None
    of_heads = layer.recent[:, _query_heads(heads, layer)]
    wanted = of_heads[part.recent + layer.first_recent].transpose(1, 2)
    count = part.recent.shape[1]
    positions = part.lengths[:, None] + torch.arange(-count, 0, device=part.lengths.device)
    return policy.observe(wanted, positions, keys, layer.scale, **_softmax(policy, heads, layer))


def _query_heads(heads: slice, layer: Layer) -> slice:
    """The query heads of some KV heads."""
    return slice(heads.start * layer.heads.group, heads.stop * layer.heads.group)


def _softmax(policy: KVPolicy, heads: slice, layer: Layer) -> dict[str, Any]:
    """What makes the softmax of a layer special, as arguments of ``observe``.

    One that is not there is left out: a policy need not know of it.
    """
    found: dict[str, Any] = {}
    if layer.sinks is not None:
        found["sinks"] = layer.sinks[..., _query_heads(heads, layer)]
    if layer.softcap is not None and policy.capabilities.caps_logits:
        found["softcap"] = layer.softcap
    return found


def _sum_up(seen: torch.Tensor, part: Part, layer: Layer) -> None:
    """Add what was observed in earlier chunks of the prompts; keep it for later ones."""
    assert part.queries is not None
    for row, (request, first) in enumerate(
        zip(part.queries.requests, part.queries.first, strict=True)
    ):
        total = layer.observations.add(request, layer.name, seen[row], first)
        if part.choice is None:
            layer.observations.keep(request, layer.name, total.clone())
        else:
            layer.observations.forget(request, layer.name)


def _moved(content: torch.Tensor, chosen: torch.Tensor, part: Part) -> torch.Tensor:
    """Kept tokens of K or V as the blocks that they go to, [M, heads, block_size, D]."""
    assert part.choice is not None
    size = part.tokens // part.blocks.shape[1]
    blocks = pack(content, chosen).unflatten(2, (-1, size)).transpose(1, 2)
    return blocks[part.choice.source_row, part.choice.source_block]


def _zeroed(content: torch.Tensor, part: Part) -> torch.Tensor:
    """K or V with zeros behind the tokens that are there: what is there can be NaN."""
    for row, length in enumerate(part.present):
        if length < part.tokens:
            content[row, :, length:] = 0
    return content
