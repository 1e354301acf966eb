# SPDX-License-Identifier: Apache-2.0
"""What a step has to compact: block numbers and counts, made once for all layers of one layout."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.base import KVPolicy, first_observed
from kv_policies.layout.base import IntArray, Segments, runs
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.workspace import Workspace


class Tally(NamedTuple):
    """Segments that a step compacts, for metrics.

    Attributes:
        kind: "prompt" or "window".
        segments: How many there are.
        tokens: Tokens in them.
        kept: Tokens that the blocks that stay could hold raw.
    """

    kind: str
    segments: int
    tokens: int
    kept: int


def tallies(ending: Segments, block_size: int) -> list[Tally]:
    """Count the segments that end in a step."""
    found = []
    for kind, which in (("prompt", ending.is_prompt), ("window", ~ending.is_prompt)):
        of_kind = ending.some(which)
        if count := len(of_kind.row):
            blocks = int((of_kind.stop - of_kind.start).sum())
            kept = int(of_kind.kept.sum())
            found.append(Tally(kind, count, blocks * block_size, kept * block_size))
    return found


class Queries(NamedTuple):
    """Queries to observe, of R prompts padded to Q.

    Attributes:
        tokens: Each query among the step's tokens, int64 [R, Q].
        positions: Its position in the prompt, int64 [R, Q]; -1 for padding.
        requests: Names.
        first: Whether the sum of a request starts here.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    requests: list[str]
    first: list[bool]


class Choice(NamedTuple):
    """What stays of R segments.

    Attributes:
        choosable: Tokens of the segment without a raw tail, int64 [R].
        kept: Tokens of these that stay, int64 [R].
        most: The maximum of ``kept``.
        destination: Physical blocks that are filled, int64 [M], all of the segments.
        source_row: The segment that each comes from, int64 [M].
        source_block: Which block of its kept tokens goes there, int64 [M].
    """

    choosable: torch.Tensor
    kept: torch.Tensor
    most: int
    destination: torch.Tensor
    source_row: torch.Tensor
    source_block: torch.Tensor


class Part(NamedTuple):
    """R segments that are worked on together, padded to C columns and T tokens.

    Attributes:
        blocks: Physical blocks, int64 [R, C].
        lengths: Tokens that are there, int64 [R].
        present: The same on the host.
        tokens: T.
        queries: What is observed; None for decode windows.
        choice: What stays; None for prompts that do not end in this step.
    """

    blocks: torch.Tensor
    lengths: torch.Tensor
    present: list[int]
    tokens: int
    queries: Queries | None
    choice: Choice | None


@dataclass(frozen=True)
class Work:
    """What one step has to do after attention, for every layer of one layout.

    Attributes:
        prompts: Parts for the policy.
        windows: Parts for ``window_policy``.
        tallies: What metrics count.
    """

    prompts: list[Part]
    windows: list[Part]
    tallies: list[Tally]


def plan_step(
    layout: TokenLayout,
    policy: KVPolicy,
    table: torch.Tensor,
    step: Step,
    space: Workspace,
) -> Work | None:
    """What a step has to do; None for nothing, as in most steps.

    Args:
        layout: The layout of the layers.
        policy: What scores.
        table: Physical block of each column, int [R, C], on any device.
        step: The requests, R rows.
        space: What bounds a part.
    """
    ending = step.ending(layout)
    watched = _watched(layout, policy, step) if policy.capabilities.needs_queries else {}
    if ending is None and not watched:
        return None
    plan = _Plan(layout, table, step, space)
    prompts, windows = [], []
    if ending is not None:
        of_prompts = ending.some(ending.is_prompt)
        prompts = plan.parts(of_prompts.row, step.n[of_prompts.row], of_prompts, watched)
        of_windows = ending.some(~ending.is_prompt)
        size = (of_windows.stop - of_windows.start) * layout.block_size
        windows = plan.parts(of_windows.row, size, of_windows, {})
    ends = set() if ending is None else set(ending.row[ending.is_prompt].tolist())
    if rows := [row for row in watched if row not in ends]:
        seen = np.array([watched[row].stop for row in rows])
        prompts += plan.parts(np.array(rows), seen, None, watched)
    return Work(prompts, windows, tallies(ending, layout.block_size) if ending else [])


class _Watched(NamedTuple):
    """Prompt positions ``[start, stop)`` whose queries are observed, the first of them being
    ``token`` among the step's tokens; ``first``: none were observed before."""

    start: int
    stop: int
    token: int
    first: bool


def _watched(layout: TokenLayout, policy: KVPolicy, step: Step) -> dict[int, _Watched]:
    """By row, what is observed in a step."""
    watched = {}
    for row in step.prefilling:
        n, c, q = int(step.n[row]), int(step.c[row]), int(step.q[row])
        stop = min(n, c + q)
        # Most chunks of a prompt lie in front of all queries that are wanted.
        if stop <= min(policy.first_query(n), n - 1) or not layout.gap(n):
            continue
        begin = first_observed(policy, layout, n)
        if (start := max(begin, c)) < stop:
            watched[row] = _Watched(start, stop, int(step.starts[row]) + start - c, c <= begin)
    return watched


@dataclass(frozen=True)
class _Plan:
    """Makes the parts of one step."""

    layout: TokenLayout
    table: torch.Tensor
    step: Step
    space: Workspace

    def parts(
        self,
        row: IntArray,
        lengths: IntArray,
        segments: Segments | None,
        watched: dict[int, _Watched],
    ) -> list[Part]:
        """Parts of segments of rows ``row``; ``segments`` None: they only observe."""
        if not len(row):
            return []
        return [
            self._part(
                row[some],
                lengths[some],
                None if segments is None else segments.some(some),
                [watched[at] for at in row[some].tolist()] if watched else None,
            )
            for some in self.space.rows(lengths.tolist())
        ]

    def _part(
        self,
        row: IntArray,
        lengths: IntArray,
        segments: Segments | None,
        watched: list[_Watched] | None,
    ) -> Part:
        size = self.layout.block_size
        start = np.zeros_like(row) if segments is None else segments.start
        count = -(-lengths // size)
        columns = start[:, None] + np.minimum(np.arange(count.max()), count[:, None] - 1)
        return Part(
            blocks=self._blocks(row[:, None], columns),
            lengths=self._there(lengths),
            present=lengths.tolist(),
            tokens=columns.shape[1] * size,
            queries=None if watched is None else self._queries(row, watched),
            choice=None if segments is None else self._choice(segments),
        )

    def _choice(self, segments: Segments) -> Choice:
        size = self.layout.block_size
        row, block = runs(segments.kept)
        column = (segments.stop - segments.kept)[row] + block
        return Choice(
            choosable=self._there((segments.stop - segments.start) * size),
            kept=self._there(segments.kept * size),
            most=int(segments.kept.max()) * size,
            destination=self._blocks(segments.row[row], column),
            source_row=self._there(row),
            source_block=self._there(block),
        )

    def _queries(self, row: IntArray, watched: list[_Watched]) -> Queries:
        start, stop, token, first = (np.array(x)[:, None] for x in zip(*watched, strict=True))
        count = stop - start
        offset = np.arange(count.max())
        return Queries(
            tokens=self._there(token + np.minimum(offset, count - 1)),
            positions=self._there(np.where(offset < count, start + offset, -1)),
            requests=[self.step.ids[at] for at in row.tolist()],
            first=first[:, 0].tolist(),
        )

    def _blocks(self, row: IntArray, column: IntArray) -> torch.Tensor:
        return self.table[self._there(row), self._there(column)].long()

    def _there(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(
            self.table.device, non_blocking=True
        )
