# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of the step it runs, on the host: shared by all groups of layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from kv_policies.compaction import Observations
from kv_policies.layout.step import Step
from vllm_plugin.kv_cache.activity import Activity
from vllm_plugin.kv_cache.requests import opts_out

_Read = tuple[torch.Tensor, torch.Tensor, list[str]]


class Batch:
    """Prompt lengths and opt-outs of the requests in a step, from either model runner.

    vLLM does not hand prompt lengths to attention; the worker does, through this object, which it
    gives to each metadata builder. Outside ``step`` (profiling, warm-up) there is none.

    layers: compressed layers of the model.
    """

    def __init__(self, runner: Any, v2: bool, layers: int) -> None:
        self.observations = Observations()
        self.activity = Activity(layers)
        self._runner = runner
        self._read = self._v2 if v2 else self._v1
        self._opted_out: set[str] = set()
        self.active = False
        self._current: Step | None = None

    @contextmanager
    def step(self, scheduled: SchedulerOutput) -> Iterator[None]:
        """The step in which metadata is built and layers run."""
        for request_id in scheduled.finished_req_ids:
            self._opted_out.discard(request_id)
            self.observations.forget(request_id)
        for request in scheduled.scheduled_new_reqs:
            if opts_out(request.sampling_params):
                self._opted_out.add(request.req_id)
        self.active, self._current = True, None
        try:
            yield
        finally:
            self.active = False

    def current(self, metadata: CommonAttentionMetadata) -> Step | None:
        """The current step; rows that only pad the batch have n = 0."""
        if self.active and self._current is None:
            n, c, ids = self._read(metadata)
            padded = metadata.num_reqs
            starts = metadata.query_start_loc_cpu[: padded + 1].long()
            opted_out = None
            if self._opted_out:
                opted_out = torch.zeros(padded, dtype=torch.bool)
                opted_out[: len(ids)] = torch.tensor([name in self._opted_out for name in ids])
            self._current = Step(n, c, starts[1:] - starts[:-1], starts[:-1], ids, opted_out)
        return self._current if self.active else None

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
