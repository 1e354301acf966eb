# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of the step it runs, on the host: shared by all groups of layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from kv_policies.compaction import Observations
from kv_policies.layout.base import Amount
from kv_policies.layout.segments import IntArray
from kv_policies.layout.step import Step
from kv_policies.recent_queries import RecentQueries
from vllm_plugin.kv_cache.activity import Activity
from vllm_plugin.kv_cache.requests import asked, opts_out

_Read = tuple[IntArray, IntArray, list[str]]


class Batch:
    """What requests asked for, and their prompt lengths, in a step, from either model runner.

    vLLM does not give prompt lengths to attention. The worker does, through this object, which each
    metadata builder has. Outside ``step``, as when graphs are captured, the current step is one of
    rows that pad the batch, so that the same memory is used.

    Args:
        runner: The worker's model runner.
        v2: Whether it is vLLM's second one.
        activity: Counts what is compacted.
        head: ``Layout.head``, the same in all layers.
    """

    def __init__(
        self, runner: Any, v2: bool, activity: Activity, head: Callable[[IntArray], IntArray]
    ) -> None:
        self.observations = Observations()
        self.recent: RecentQueries | None = None  # where windows are scored with queries
        self.activity = activity
        self._runner, self._head = runner, head
        self._read = self._v2 if v2 else self._v1
        self._opted_out: set[str] = set()
        self._asked: dict[str, Amount] = {}
        self.active = False
        self._current: Step | None = None
        self._expected = 0
        self._put_off: list[Callable[[], None]] = []

    @contextmanager
    def step(self, scheduled: SchedulerOutput) -> Iterator[None]:
        """The step in which metadata is built and layers run."""
        for request_id in scheduled.finished_req_ids:
            self._opted_out.discard(request_id)
            self._asked.pop(request_id, None)
            self._forget(request_id)
        for request_id in scheduled.preempted_req_ids or ():
            self._forget(request_id)  # it will start anew
        for request in scheduled.scheduled_new_reqs:
            if opts_out(request.sampling_params):
                self._opted_out.add(request.req_id)
            elif (amount := asked(request.sampling_params)) is not None:
                self._asked[request.req_id] = amount
        self.active, self._current, self._expected = True, None, 0
        self._put_off.clear()
        try:
            yield
        finally:
            self.active = False

    def current(self, metadata: CommonAttentionMetadata) -> Step:
        """The current step, which all groups share."""
        if not self.active:
            none = np.zeros(metadata.num_reqs, np.int64)
            return Step(none, none, none + 1, none, [])
        if self._current is None:
            n, c, ids = self._read(metadata)
            n = self._head(n)
            starts = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
            if self._opted_out:
                n[: len(ids)][[name in self._opted_out for name in ids]] = 0
            amounts = tuple(map(self._asked.get, ids)) if self._asked else None
            self._current = Step(n, c, starts[1:] - starts[:-1], starts[:-1], ids, amounts)
        return self._current

    def expect(self, layers: int) -> None:
        """Layers that have something to compact inside this step's forward pass."""
        self._expected += layers

    @contextmanager
    def working(self) -> Iterator[None]:
        """One layer does it, in the block."""
        with self.activity.timed():
            yield
        self._expected -= 1

    def put_off(self, work: Callable[[], None]) -> None:
        """What a group of layers compacts without queries, for ``finish``."""
        self._put_off.append(work)

    def finish(self) -> None:
        """Compact what was put off, after the forward pass of all layers and on its stream.

        Raises:
            RuntimeError: Prompts were not compacted, because the forward pass was a graph. Their
                blocks would be freed all the same.
        """
        if self._expected:
            raise RuntimeError(
                "a prompt was not compacted in the step that ended it, in "
                f"{self._expected} layers: vLLM replayed a CUDA graph there; serve with "
                "--compilation-config.cudagraph_mode NONE, and report this with your version of "
                "vLLM"
            )
        if not self._put_off:
            return
        with self.activity.timed():
            for work in self._put_off:
                work()
        self._put_off.clear()

    def _forget(self, request_id: str) -> None:
        """Drop what was seen of a request."""
        self.observations.forget(request_id)
        if self.recent is not None:
            self.recent.forget(request_id)

    def _v1(self, metadata: CommonAttentionMetadata) -> _Read:
        batch = self._runner.input_batch
        rows = slice(metadata.num_reqs)
        n = batch.num_prompt_tokens_cpu_tensor.numpy()[rows].astype(np.int64)
        n[batch.num_reqs :] = 0
        c = batch.num_computed_tokens_cpu_tensor.numpy()[rows].astype(np.int64)
        c[batch.num_reqs :] = 0
        return n, c, list(batch.req_ids)

    def _v2(self, metadata: CommonAttentionMetadata) -> _Read:
        state, index = self._runner.req_states, metadata.req_idx
        n, c = np.zeros((2, metadata.num_reqs), np.int64)
        n[: len(index)] = state.prompt_len.np[index]
        c[: len(index)] = state.num_computed_tokens_np[index]
        return n, c, [state.index_to_req_id[int(i)] for i in index]
