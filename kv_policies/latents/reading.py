# SPDX-License-Identifier: Apache-2.0
"""What attention reads of latents in a step: block numbers, for all layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from kv_policies.latents.columns import Contents, LatentColumns
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step


@dataclass(frozen=True)
class Reading:
    """What attention reads for the R requests of a step that have latents.

    Attributes:
        tokens: Each query among the step's tokens, int64 [R, Q], padded with a request's last one.
        seen: Raw tokens that each query sees, int64 [R, Q].
        raw: Blocks of these, int64 [R, C].
        blocks: Blocks of latents, int64 [R, L].
        contents: What is in them.
        whole: These are all requests of the step.
    """

    tokens: torch.Tensor
    seen: torch.Tensor
    raw: torch.Tensor
    blocks: torch.Tensor
    contents: Contents
    whole: bool

    @cached_property
    def narrow(self) -> dict[str, torch.Tensor]:
        """For kernels, int32. Converted once for all layers.

        ``tokens``, ``raw_lens`` and ``row``, of each query [R * Q]: itself, raw tokens that it sees
        and its request. ``raw_table`` and ``table``: ``raw`` and ``blocks``. ``lengths`` and
        ``starts``, of each request [R]: its latents and the position of the first.
        """
        requests, queries = self.tokens.shape
        row = torch.arange(requests, device=self.tokens.device).repeat_interleave(queries)
        tensors = {
            "tokens": self.tokens.flatten(),
            "raw_lens": self.seen.flatten(),
            "row": row,
            "raw_table": self.raw,
            "table": self.blocks,
            "lengths": self.contents.count.sum(1),
            "starts": self.contents.first[:, 0],
        }
        return {name: tensor.int() for name, tensor in tensors.items()}

    @cached_property
    def _parts(self) -> dict[tuple[int, int], list["Reading"]]:
        return {}

    def parts(self, rows: int, queries: int) -> list["Reading"]:
        """The reading in parts. Made once for all layers that cut it alike.

        Args:
            rows: Requests of a part.
            queries: Query tokens of each.
        """
        if rows >= len(self.tokens) and queries >= self.tokens.shape[1]:
            return [self]
        if (rows, queries) not in self._parts:
            self._parts[rows, queries] = [
                part
                for row in range(0, len(self.tokens), rows)
                for part in self._some(slice(row, row + rows), queries)
            ]
        return self._parts[rows, queries]

    def _some(self, rows: slice, queries: int) -> Iterator["Reading"]:
        """Parts of some requests, which share what they hold."""
        first, count = self.contents.first[rows], self.contents.count[rows]
        contents = Contents(first, count, self.contents.per_block, self.contents.longest)
        for query in range(0, self.tokens.shape[1], queries):
            some = rows, slice(query, query + queries)
            yield Reading(
                self.tokens[some].contiguous(),
                self.seen[some].contiguous(),
                self.raw[rows],
                self.blocks[rows],
                contents,
                self.whole,
            )


class LatentView:
    """What attention reads of latents.

    Args:
        layout: Of a group of layers.
        columns: Shared by the groups whose layouts have this timing.
    """

    def __init__(self, layout: LatentLayout, columns: LatentColumns | None = None) -> None:
        self._layout, self._all = layout, columns or LatentColumns([layout])
        self._index = self._all.layouts.index(layout)

    def update(self, step: Step, table: torch.Tensor, view: torch.Tensor) -> Reading | None:
        """The reading of a step; None where no request has latents.

        Args:
            step: The requests, R rows.
            table: Physical block of each column, int [R, C].
            view: Raw blocks of each request, moved left, as ``table``.
        """
        if not self._layout.tokens or (found := self._all.update(step, table)) is None:
            return None
        aged, planned = found
        places, contents = planned[self._index]
        raw = view[:, : aged.columns]
        return Reading(
            tokens=aged.tokens,
            seen=aged.seen,
            raw=(raw if aged.some is None else raw[aged.some]).long(),
            blocks=table.take(places).long(),
            contents=contents,
            whole=aged.whole,
        )
