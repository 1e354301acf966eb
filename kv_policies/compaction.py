# SPDX-License-Identifier: Apache-2.0
"""One compaction: score what a segment holds, choose, and pack it into the segment's last blocks.

``plan_step`` says, per group of layers with one layout, what a step has to do; ``compact`` does it
for one layer. Both are vectorised over the requests; loops are over requests in prefill only.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kv_policies.base import KVPolicy, first_observed
from kv_policies.key_diff import KeyDiff
from kv_policies.layout import Layout, SegmentBatch
from kv_policies.select import pack, select


class Pages(Protocol):
    """K and V of one layer by physical block, [..., Hkv, block_size, D]."""

    def keys(self, blocks: torch.Tensor) -> torch.Tensor: ...

    def values(self, blocks: torch.Tensor) -> torch.Tensor: ...

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None: ...


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


class Segments(NamedTuple):
    """Segments to compact with one choice of policy, of S requests padded to C columns.

    blocks: int64 [S, C] physical. lengths: int64 [S] tokens that are there, present the same on the
    host. choosable: int64 [S], the first tokens, from which kept int64 [S] stay; most is its
    maximum. destination: int64 [M] physical blocks, filled from (source_row, source_block), int64
    [M] each, of what was chosen.
    """

    blocks: torch.Tensor
    lengths: torch.Tensor
    present: list[int]
    choosable: torch.Tensor
    kept: torch.Tensor
    most: int
    destination: torch.Tensor
    source_row: torch.Tensor
    source_block: torch.Tensor


class Queries(NamedTuple):
    """Queries to observe, of O prompts padded to Q: tokens int64 [O, Q] index the step's tokens,
    positions int64 [O, Q] with -1 for padding; blocks int64 [O, C] of the keys that they see.

    seen: keys that the last query sees. requests, first, ends: name, whether its sum starts here,
    and whether its prompt ends here.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    seen: list[int]
    requests: list[str]
    first: list[bool]
    ends: list[bool]


@dataclass(frozen=True)
class Work:
    """What one step has to do after attention, for every layer of one layout."""

    policy: KVPolicy
    window_policy: KVPolicy
    queries: Queries | None
    prompts: Segments | None
    windows: Segments | None


def window_policy(policy: KVPolicy) -> KVPolicy:
    """What scores decode windows: the policy, or key_diff where it needs queries.

    When a window ends only its last query is at hand, which says little about the window.
    """
    return KeyDiff(KeyDiff.settings_type()) if policy.capabilities.needs_queries else policy


def plan_step(
    layout: Layout,
    policy: KVPolicy,
    table: torch.Tensor,
    n: torch.Tensor,
    c: torch.Tensor,
    q: torch.Tensor,
    starts: torch.Tensor,
    ids: list[str],
    opted_out: torch.Tensor | None = None,
) -> Work | None:
    """The work of a step ``[c, c + q)`` per request; None when there is none, as in most steps.

    table: int [R, C], on any device. n, c, q, starts: int64 [R] on the host; ``starts`` is the
    index of a request's first token in the step. ids: names of the rows that are not padding.
    """
    ending = layout.ending_batch(n, c, q, opted_out)
    is_prompt = ending.start == 0
    prompts = _segments(layout, table, ending, is_prompt, n)
    windows = _segments(layout, table, ending, ~is_prompt, None)
    queries = None
    if policy.capabilities.needs_queries:
        queries = _queries(layout, policy, table, n, c, q, starts, ids, opted_out)
    if queries is None and prompts is None and windows is None:
        return None
    return Work(policy, window_policy(policy), queries, prompts, windows)


def _segments(
    layout: Layout,
    table: torch.Tensor,
    ending: SegmentBatch,
    which: torch.Tensor,
    n: torch.Tensor | None,
) -> Segments | None:
    if not bool(which.any()):
        return None
    row, start, stop, kept, _ = (column[which] for column in ending)
    size = layout.block_size
    choosable = (stop - start) * size
    # Scores of a prompt take its raw tail into account.
    lengths = n[row] if n is not None else choosable
    columns = start[:, None] + torch.arange(int((lengths + size - 1).max()) // size)
    columns = torch.minimum(columns, (start + (lengths + size - 1) // size - 1)[:, None])
    source_row = torch.repeat_interleave(kept)
    source_block = torch.arange(len(source_row)) - (kept.cumsum(0) - kept)[source_row]
    column = (stop - kept)[source_row] + source_block

    def there(index: torch.Tensor) -> torch.Tensor:
        return index.to(table.device, non_blocking=True)

    rows = there(row)
    return Segments(
        blocks=table[rows[:, None], there(columns)].long(),
        lengths=there(lengths),
        present=lengths.tolist(),
        choosable=there(choosable),
        kept=there(kept * size),
        most=int(kept.max()) * size,
        destination=table[there(row[source_row]), there(column)].long(),
        source_row=there(source_row),
        source_block=there(source_block),
    )


def _queries(
    layout: Layout,
    policy: KVPolicy,
    table: torch.Tensor,
    n: torch.Tensor,
    c: torch.Tensor,
    q: torch.Tensor,
    starts: torch.Tensor,
    ids: list[str],
    opted_out: torch.Tensor | None,
) -> Queries | None:
    spans = []
    for row in ((c < n) & (q > 0)).nonzero().flatten().tolist():
        length, at = int(n[row]), int(c[row])
        if not layout.gap(length) or (opted_out is not None and bool(opted_out[row])):
            continue
        begin = first_observed(policy, layout, length)
        first, stop = max(begin, at), min(length, at + int(q[row]))
        if first < stop:
            spans.append((row, first, stop, int(starts[row]) + first - at, at <= begin))
    if not spans:
        return None
    most = max(stop - first for _, first, stop, _, _ in spans)
    offset = torch.arange(most)
    first = torch.tensor([span[1] for span in spans])[:, None]
    count = torch.tensor([span[2] - span[1] for span in spans])[:, None]
    token = torch.tensor([span[3] for span in spans])[:, None]
    columns = -(-max(stop for _, _, stop, _, _ in spans) // layout.block_size)
    rows = torch.tensor([span[0] for span in spans])
    return Queries(
        tokens=(token + torch.minimum(offset, count - 1)).to(table.device),
        positions=torch.where(offset < count, first + offset, -1).to(table.device),
        blocks=table[rows.to(table.device), :columns].long(),
        seen=[span[2] for span in spans],
        requests=[ids[span[0]] for span in spans],
        first=[span[4] for span in spans],
        ends=[span[2] == int(n[span[0]]) for span in spans],
    )


def compact(
    work: Work,
    layer: str,
    pages: Pages,
    query: torch.Tensor,
    scale: float,
    observations: Observations,
) -> None:
    """Do a step's work on one layer, after its attention: observe, choose, pack.

    query: [tokens, Hq, D], after RoPE, of all tokens of the step. scale: of q.k in the softmax.
    """
    observed = keys = None
    if work.queries is not None:
        keys = _keys(pages, work.queries.blocks, work.queries.seen)
        observed = _observe(work, work.queries, layer, keys, query, scale, observations)
        if observed is None or len(observed) != len(keys):
            keys = None  # of other prompts too
    if work.prompts is not None:
        _pack(work.policy, work.prompts, pages, keys, observed)
    if work.windows is not None:
        _pack(work.window_policy, work.windows, pages, None, None)


def _observe(
    work: Work,
    queries: Queries,
    layer: str,
    keys: torch.Tensor,
    query: torch.Tensor,
    scale: float,
    observations: Observations,
) -> torch.Tensor | None:
    """Add what the queries say; returns the sums [S, H, T] of the segments that end, or None."""
    wanted = query[queries.tokens].transpose(1, 2)
    seen = work.policy.observe(wanted, queries.positions, keys, scale)
    assert seen is not None
    done = []
    for row, request in enumerate(queries.requests):
        total = observations.add(request, layer, seen[row], queries.first[row])
        if queries.ends[row]:
            observations.forget(request, layer)
            done.append(row)
        else:
            observations.keep(request, layer, total.clone())
    if len(done) == len(seen):
        return seen
    return seen[done] if done else None


def _pack(
    policy: KVPolicy,
    segments: Segments,
    pages: Pages,
    keys: torch.Tensor | None,
    observed: torch.Tensor | None,
) -> None:
    if keys is None:
        keys = _keys(pages, segments.blocks, segments.present)
    if observed is not None:
        observed = observed[..., : keys.shape[2]]
    scores = policy.score(observed, keys, segments.lengths)
    chosen = select(scores, segments.choosable, segments.kept, segments.most)
    size = keys.shape[2] // segments.blocks.shape[1]
    kept = [
        pack(content, chosen)
        .unflatten(2, (-1, size))
        .transpose(1, 2)[segments.source_row, segments.source_block]
        for content in (keys, _in_order(pages.values(segments.blocks)))
    ]
    pages.write(segments.destination, *kept)


def _keys(pages: Pages, blocks: torch.Tensor, present: list[int]) -> torch.Tensor:
    """Keys [R, Hkv, T, D] of blocks [R, C]; zeros behind those that are there."""
    keys = _in_order(pages.keys(blocks))
    for row, length in enumerate(present):
        keys[row, :, length:] = 0  # may be anything, and NaN * 0 is NaN
    return keys


def _in_order(blocks: torch.Tensor) -> torch.Tensor:
    """[R, C, H, block_size, D] to [R, H, C * block_size, D]."""
    return blocks.transpose(1, 2).flatten(2, 3)
