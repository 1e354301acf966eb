# SPDX-License-Identifier: Apache-2.0
"""One compaction: score what a segment holds, choose, and pack it into the segment's last blocks.

``plan_step`` says, per group of layers with one layout, what a step has to do; ``compact`` does it
for one layer. Both are vectorised over the requests; loops are over requests in prefill only.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kv_policies.base import KVPolicy, first_observed
from kv_policies.layout.base import runs
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import SegmentBatch, TokenLayout
from kv_policies.policies.key_diff import KeyDiff
from kv_policies.select import pack, select


class Content(Protocol):
    """K and V of some blocks, [R, Hkv, C * block_size, D], copies."""

    def keys(self) -> torch.Tensor: ...

    def values(self) -> torch.Tensor: ...


class Pages(Protocol):
    """K and V of one layer by physical block: reads [R, C] blocks, writes [M, Hkv, bs, D]."""

    def read(self, blocks: torch.Tensor) -> Content: ...

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


class Tally(NamedTuple):
    """Segments of one kind, "prompt" or "window", that a step compacts: of how many requests, how
    many tokens there were, and how many of them the blocks that stay could hold raw."""

    kind: str
    requests: int
    tokens: int
    kept: int


class Segments(NamedTuple):
    """Segments to compact with one choice of policy, of S requests padded to C columns.

    blocks: int64 [S, C] physical. first: int64 [S], position of the first token. lengths: int64 [S]
    tokens that are there, present the same on the host. choosable: int64 [S], the first tokens,
    from which kept int64 [S] stay; most is its maximum. destination: int64 [M] physical blocks,
    filled from (source_row, source_block), int64 [M] each, of what was chosen. tally: what metrics
    count.
    """

    blocks: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    present: list[int]
    choosable: torch.Tensor
    kept: torch.Tensor
    most: int
    destination: torch.Tensor
    source_row: torch.Tensor
    source_block: torch.Tensor
    tally: Tally


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

    queries: Queries | None
    prompts: Segments | None
    windows: Segments | None

    @property
    def tallies(self) -> list[Tally]:
        """What metrics count."""
        return [segments.tally for segments in (self.prompts, self.windows) if segments]


def window_policy(policy: KVPolicy) -> KVPolicy:
    """What scores decode windows: the policy, or key_diff where it needs queries.

    When a window ends only its last query is at hand, which says little about the window.
    """
    return KeyDiff(KeyDiff.settings_type()) if policy.capabilities.needs_queries else policy


def plan_step(
    layout: TokenLayout,
    policy: KVPolicy,
    table: torch.Tensor,
    step: Step,
) -> Work | None:
    """What a step has to do; None for nothing, as in most steps.

    table: int [R, C], physical block of each column, on any device.
    """
    ending = layout.ending_batch(step.n, step.c, step.q, step.opted_out)
    is_prompt = ending.start == 0
    prompts = _segments("prompt", layout, table, ending, is_prompt, step.n)
    windows = _segments("window", layout, table, ending, ~is_prompt, None)
    queries = None
    if policy.capabilities.needs_queries:
        queries = _queries(layout, policy, table, step)
    if queries is None and prompts is None and windows is None:
        return None
    return Work(queries, prompts, windows)


def _segments(
    kind: str,
    layout: TokenLayout,
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
    source_row, source_block = runs(kept)
    column = (stop - kept)[source_row] + source_block

    def there(index: torch.Tensor) -> torch.Tensor:
        return index.to(table.device, non_blocking=True)

    rows = there(row)
    return Segments(
        blocks=table[rows[:, None], there(columns)].long(),
        first=there(start * size),
        lengths=there(lengths),
        present=lengths.tolist(),
        choosable=there(choosable),
        kept=there(kept * size),
        most=int(kept.max()) * size,
        destination=table[there(row[source_row]), there(column)].long(),
        source_row=there(source_row),
        source_block=there(source_block),
        tally=Tally(kind, len(row), int(choosable.sum()), len(source_row) * size),
    )


def _queries(
    layout: TokenLayout,
    policy: KVPolicy,
    table: torch.Tensor,
    step: Step,
) -> Queries | None:
    spans = []
    for row in ((step.c < step.n) & (step.q > 0)).nonzero().flatten().tolist():
        n, c, q = int(step.n[row]), int(step.c[row]), int(step.q[row])
        if not layout.gap(n) or (step.opted_out is not None and bool(step.opted_out[row])):
            continue
        begin = first_observed(policy, layout, n)
        first, stop = max(begin, c), min(n, c + q)
        if first < stop:
            spans.append((row, first, stop, int(step.starts[row]) + first - c, c <= begin))
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
        requests=[step.ids[span[0]] for span in spans],
        first=[span[4] for span in spans],
        ends=[span[2] == int(step.n[span[0]]) for span in spans],
    )


def compact(
    work: Work,
    policy: KVPolicy,
    layer: str,
    pages: Pages,
    query: torch.Tensor,
    scale: float,
    observations: Observations,
) -> None:
    """Do a step's work on one layer, after its attention: observe, choose, pack.

    query: [tokens, Hq, D], after RoPE, of all tokens of the step. scale: of q.k in the softmax.
    """
    observed = keys = content = None
    if work.queries is not None:
        content = pages.read(work.queries.blocks)
        keys = _keys(content, work.queries.seen)
        observed = _observe(policy, work.queries, layer, keys, query, scale, observations)
        if observed is None or len(observed) != len(keys):
            content = keys = None  # of other prompts too
    if work.prompts is not None:
        content = content or pages.read(work.prompts.blocks)
        keys = _keys(content, work.prompts.present) if keys is None else keys
        _pack(policy, work.prompts, pages, content, keys, observed)
    if work.windows is not None:
        content = pages.read(work.windows.blocks)
        keys = _keys(content, work.windows.present)
        _pack(window_policy(policy), work.windows, pages, content, keys, None)


def _observe(
    policy: KVPolicy,
    queries: Queries,
    layer: str,
    keys: torch.Tensor,
    query: torch.Tensor,
    scale: float,
    observations: Observations,
) -> torch.Tensor | None:
    """Add what the queries say; returns the sums [S, H, T] of the segments that end, or None."""
    wanted = query[queries.tokens].transpose(1, 2)
    seen = policy.observe(wanted, queries.positions, keys, scale)
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
    content: Content,
    keys: torch.Tensor,
    observed: torch.Tensor | None,
) -> None:
    if observed is not None:
        observed = observed[..., : keys.shape[2]]
    scores = policy.score(observed, keys, segments.lengths)
    chosen = select(scores, segments.choosable, segments.kept, segments.most)
    size = keys.shape[2] // segments.blocks.shape[1]
    kept = [
        pack(tokens, chosen)
        .unflatten(2, (-1, size))
        .transpose(1, 2)[segments.source_row, segments.source_block]
        for tokens in (keys, content.values())
    ]
    pages.write(segments.destination, *kept)


def _keys(content: Content, present: list[int]) -> torch.Tensor:
    """Keys [R, Hkv, T, D], zeros behind those that are there."""
    keys = content.keys()
    for row, length in enumerate(present):
        keys[row, :, length:] = 0  # may be anything, and NaN * 0 is NaN
    return keys
