# SPDX-License-Identifier: Apache-2.0
"""What a step has to compact: block numbers and counts, the same for all layers of one layout."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


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
        queries: What is observed of prompts; None for decode windows.
        choice: What stays; None for prompts that do not end in this step.
        recent: Places of the last queries of decode windows, int64 [R, Q], oldest first: see
            ``RecentQueries``. None for prompts, and where none are observed.
    """

    blocks: torch.Tensor
    lengths: torch.Tensor
    present: list[int]
    tokens: int
    queries: Queries | None
    choice: Choice | None
    recent: torch.Tensor | None = None

    def on(self, table: torch.Tensor) -> "Part":
        """The part with blocks of a table, where it has their places in the flat table so far."""
        choice = self.choice
        if choice is not None:
            choice = choice._replace(destination=table.take(choice.destination).long())
        return self._replace(blocks=table.take(self.blocks).long(), choice=choice)


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
