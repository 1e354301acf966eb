# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of the step it runs, on the host: shared by all groups of layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from kv_policies.compaction import Observations
from kv_policies.layout import Layout
from vllm_plugin.kv_cache.requests import opts_out

_Read = tuple[torch.Tensor, torch.Tensor, list[str]]


@dataclass(frozen=True)
class Rows:
    """The requests of a step, one row each: int64 [R] on the host, see ``Layout.view``.

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
    _busy: dict[tuple[int, int], bool] = field(default_factory=dict)

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
        key = layout.block_size, layout.window
        if key not in self._busy:
            prefill = bool((self.c.numpy() < self.n.numpy()).any())
            self._busy[key] = prefill or layout.window_ends(self.n, self.c, self.q)
        return self._busy[key]

    def passes(self, layout: Layout) -> "list[tuple[torch.Tensor | None, Rows]]":
        """The step as ``Layout.substeps``: rows of each pass and, unless it is all there is, the
        tokens that take part.
        """
        ends = layout.ending_batch(self.n, self.c, self.q, self.opted_out)
        if bool((ends.ends == (self.c + self.q)[ends.row]).all()):
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

    def _part(self, cuts: list[tuple[int, int, int]]) -> "tuple[torch.Tensor, Rows]":
        row, c, q = torch.tensor(cuts).unbind(1)
        starts = self.starts[row] + c - self.c[row]
        tokens = torch.repeat_interleave(starts - (q.cumsum(0) - q), q) + torch.arange(int(q.sum()))
        opted_out = None if self.opted_out is None else self.opted_out[row]
        ids = [self.ids[at] for at in row.tolist()]
        return tokens, Rows(self.n[row], c, q, starts, ids, opted_out)


class Batch:
    """Prompt lengths and opt-outs of the requests in a step, from either model runner.

    vLLM does not hand prompt lengths to attention; the worker does, through this object, which it
    gives to each metadata builder. Outside ``step`` (profiling, warm-up) there are no rows.
    """

    def __init__(self, runner: Any, v2: bool) -> None:
        self.observations = Observations()
        self._runner = runner
        self._read = self._v2 if v2 else self._v1
        self._opted_out: set[str] = set()
        self._active = False
        self._rows: Rows | None = None

    @contextmanager
    def step(self, scheduled: SchedulerOutput) -> Iterator[None]:
        """The step in which metadata is built and layers run."""
        for request_id in scheduled.finished_req_ids:
            self._opted_out.discard(request_id)
            self.observations.forget(request_id)
        for request in scheduled.scheduled_new_reqs:
            if opts_out(request.sampling_params):
                self._opted_out.add(request.req_id)
        self._active, self._rows = True, None
        try:
            yield
        finally:
            self._active = False

    def rows(self, metadata: CommonAttentionMetadata) -> Rows | None:
        """The rows of the current step, those that only pad the batch with n = 0."""
        if self._active and self._rows is None:
            n, c, ids = self._read(metadata)
            padded = metadata.num_reqs
            starts = metadata.query_start_loc_cpu[: padded + 1].long()
            opted_out = None
            if self._opted_out:
                opted_out = torch.zeros(padded, dtype=torch.bool)
                opted_out[: len(ids)] = torch.tensor([name in self._opted_out for name in ids])
            self._rows = Rows(n, c, starts[1:] - starts[:-1], starts[:-1], ids, opted_out)
        return self._rows if self._active else None

    def _v1(self, metadata: CommonAttentionMetadata) -> _Read:
        batch = self._runner.input_batch
        n = batch.num_prompt_tokens_cpu_tensor[: metadata.num_reqs].long()
        n[batch.num_reqs :] = 0
        c = batch.num_computed_tokens_cpu_tensor[: metadata.num_reqs].long()
        return n, c, list(batch.req_ids)

    def _v2(self, metadata: CommonAttentionMetadata) -> _Read:
        state, index = self._runner.req_states, metadata.req_idx
        n = torch.zeros(metadata.num_reqs, dtype=torch.int64)
        c = torch.zeros_like(n)
        n[: len(index)] = torch.from_numpy(state.prompt_len.np[index]).long()
        c[: len(index)] = torch.from_numpy(state.num_computed_tokens_np[index]).long()
        return n, c, [state.index_to_req_id[int(i)] for i in index]
