# SPDX-License-Identifier: Apache-2.0
"""The requests of one engine step, and what a layout makes of them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from kv_policies.layout.base import Layout, runs


@dataclass(frozen=True)
class Step:
    """The requests of a step, one row each: int64 [R] on the host, see ``Layout``.

    starts: first token of each row among the step's tokens. ids: names of the rows, those that pad
    the batch (n = 0) left out. opted_out: bool [R], or None for none.
    """

    n: torch.Tensor
    c: torch.Tensor
    q: torch.Tensor
    starts: torch.Tensor
    ids: list[str]
    opted_out: torch.Tensor | None
    _on: dict[torch.device, tuple[Any, ...]] = field(default_factory=dict)
    _busy: dict[tuple[object, ...], bool] = field(default_factory=dict)

    def moves(
        self, layout: Layout, width: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``Layout.moves`` on a device, from the host's numbers."""
        if device not in self._on:
            self._on[device] = tuple(
                None if x is None else x.to(device, non_blocking=True)
                for x in (self.n, self.c, self.opted_out)
            )
        n, c, opted_out = self._on[device]
        return layout.moves(n, c, width, opted_out)

    def busy(self, layout: Layout) -> bool:
        """Whether layers of a layout may have to observe or compact in this step."""
        if layout.timing not in self._busy:
            prefill = bool((self.c.numpy() < self.n.numpy()).any())
            self._busy[layout.timing] = prefill or layout.window_ends(self.n, self.c, self.q)
        return self._busy[layout.timing]

    def passes(self, layout: Layout) -> "list[tuple[torch.Tensor | None, Step]]":
        """The step as ``Layout.substeps``: rows of each pass and, unless it is all there is, the
        tokens that take part.
        """
        if not layout.is_cut(self.n, self.c, self.q, self.opted_out):
            return [(None, self)]
        steps = []
        for row in range(len(self.ids)):
            out = self.opted_out is not None and bool(self.opted_out[row])
            its = layout.opted_out() if out else layout
            steps.append(its.substeps(int(self.n[row]), int(self.c[row]), int(self.q[row])))
        return [
            self._part([(row, *cuts[at]) for row, cuts in enumerate(steps) if at < len(cuts)])
            for at in range(max(map(len, steps)))
        ]

    def _part(self, cuts: list[tuple[int, int, int]]) -> "tuple[torch.Tensor, Step]":
        row, c, q = torch.tensor(cuts).unbind(1)
        starts = self.starts[row] + c - self.c[row]
        of, index = runs(q)
        tokens = starts[of] + index
        opted_out = None if self.opted_out is None else self.opted_out[row]
        ids = [self.ids[at] for at in row.tolist()]
        return tokens, Step(self.n[row], c, q, starts, ids, opted_out)
