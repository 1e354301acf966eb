# SPDX-License-Identifier: Apache-2.0
"""The last queries of each running request, which score a decode window when it ends.

A window ends with one token, and the queries of those before it went with their steps. So each
layer stores the query of each generated token in a ring per request. That is a function of the
tokens alone: a request that is preempted computes the same queries again and fills a new ring.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kv_policies.layout.segments import IntArray, runs
from kv_policies.layout.step import Step
from kv_policies.transfer import to_device


class Storing(NamedTuple):
    """Queries that a layer stores in a step.

    Attributes:
        tokens: Which of the step's, int64 [M] or a slice.
        places: Where to, int64 [M], the same for all layers.
    """

    tokens: torch.Tensor | slice
    places: torch.Tensor


class RecentQueries:
    """Rings of queries: ``count`` places per request, in each layer.

    Args:
        count: Last tokens of a window whose queries are wanted.
        requests: Most requests that run at a time.
        layers: Layers that store queries.
        heads: Query heads of a layer on this rank.
        size: Channels of a head.
        dtype: Of queries.
        device: Of queries.

    Attributes:
        stored: [layers * places, heads, size].
        places: Of a layer. The last ``count`` of them are of nobody.
    """

    def __init__(
        self,
        count: int,
        requests: int,
        layers: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.count, self.places = count, (requests + 1) * count
        self.stored = torch.zeros(layers * self.places, heads, size, dtype=dtype, device=device)
        self._free, self._slots = list(reversed(range(requests))), dict[str, int]()
        self._nobody = requests * count
        self._known: list[int] = []  # first places of the rows of the last decode step
        # All that rows can be, at once: a CUDA graph goes on reading this memory.
        self._first, self._there = torch.zeros(2, requests, dtype=torch.int64, device=device)

    @staticmethod
    def bytes(count: int, requests: int, heads: int, size: int, dtype: torch.dtype) -> int:
        """Memory that it takes in a layer; arguments as of the class."""
        return (requests + 1) * count * heads * size * dtype.itemsize

    def forget(self, request: str) -> None:
        """Give the ring of a request that is finished or preempted to others."""
        if (slot := self._slots.pop(request, None)) is not None:
            self._free.append(slot)

    def storing(self, step: Step, lengths: torch.Tensor) -> Storing | None:
        """What layers store in a step, or in one of its passes; None for nothing.

        Where each row decodes, the result is in the same memory in each step, and nothing is copied
        from the host unless rows changed: a CUDA graph can read it.

        Args:
            step: R rows.
            lengths: Computed tokens, those of the step included, int [R], on the device.
        """
        rows = len(step.ids)
        whole = bool((step.starts[:rows] == np.arange(rows)).all())  # not a pass of a step
        if whole and step.q.max() <= 1 and (step.q[:rows] == 1).all():
            return step.once((self, "storing"), lambda: self._decoding(step, lengths))
        return step.once((self, "storing"), lambda: self._some(step))

    def last(self, ids: Sequence[str], ends: IntArray) -> IntArray:
        """Places of the last queries in front of ``ends`` tokens, [R, count], oldest first."""
        first = np.array([self._slot(name) * self.count for name in ids])
        return first[:, None] + (ends[:, None] - self.count + np.arange(self.count)) % self.count

    def _decoding(self, step: Step, lengths: torch.Tensor) -> Storing:
        rows = len(step.q)
        generated = (step.n > 0) & (step.c >= step.n)
        ids = step.ids + [""] * (rows - len(step.ids))
        first = [
            self._slot(name) * self.count if there else self._nobody
            for name, there in zip(ids, generated.tolist(), strict=True)
        ]
        if rows > len(self._first):
            raise RuntimeError(
                f"a step has {rows} rows, more than --max-num-seqs; report this with your version "
                "of vLLM"
            )
        if self._known[:rows] != first:
            self._known[:rows] = first
            self._first[:rows].copy_(*to_device(self._first.device, np.array(first)))
        there = self._there[:rows]
        torch.remainder(lengths - 1, self.count, out=there)
        there += self._first[:rows]
        return Storing(slice(rows), there)

    def _some(self, step: Step) -> Storing | None:
        """Of each row the last generated tokens."""
        start = np.maximum(np.maximum(step.n, step.c), step.end - self.count)
        wanted = (step.end - start) * ((step.n > 0) & (step.end > start))
        row, index = runs(wanted)
        if not len(row):
            return None
        first = {at: self._slot(step.ids[at]) * self.count for at in sorted(set(row.tolist()))}
        position = start[row] + index
        places = np.array([first[at] for at in row.tolist()]) + position % self.count
        token = step.starts[row] + position - step.c[row]
        return Storing(*to_device(self.stored.device, token, places))

    def _slot(self, request: str) -> int:
        if request not in self._slots:
            if not self._free:
                raise RuntimeError(
                    f"request {request} has no room for its queries: more requests run than "
                    "--max-num-seqs; report this with your version of vLLM"
                )
            self._slots[request] = self._free.pop()
        return self._slots[request]

    def __len__(self) -> int:
        return len(self._slots)
