# SPDX-License-Identifier: Apache-2.0
"""Watches where attention goes in a step, from the queries and keys of a few rows.

Attention kernels return no probabilities. Those of tracked and active rows are computed again here,
from queries and keys as they go into the kernel: a few rows against the keys of their request.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from dllm_denoising.base import Observation, Plan
from dllm_denoising.drift import Over, Total, most_attended, probabilities, similarity
from vllm_plugin.diffusion.batch import Prepared, Running, places
from vllm_plugin.kv_cache.pages import Pages


class Probe:
    """Collects a batch's observations, layer by layer.

    batch: R requests. prepared: their step. pages: of each layer. heads: of all ranks. total: see
    ``drift``.
    """

    def __init__(
        self,
        batch: Sequence[Running],
        prepared: Prepared,
        pages: Sequence[Pages],
        heads: int,
        total: Total,
    ) -> None:
        self._pages, self._heads, self._total = pages, heads, total
        self._tables = tables = prepared.tables
        denoisers = [one.denoiser for one in batch]
        plans = [one.plan for one in denoisers]
        self._count = [one.policy.tracks for one in denoisers]
        self._over: list[Over] = [one.policy.settings.similarity for one in denoisers]
        self._starts = [plan.start for plan in plans]
        self._device = device = tables.device
        self._stages = {
            first: _Rows(of_stage, plans, device) for first, of_stage in prepared.rows.items()
        }
        width = tables.shape[1] * pages[0].shape[1]
        length = torch.tensor([len(one.canvas) for one in denoisers])[:, None]
        there = torch.arange(width) < length
        candidates = torch.zeros_like(there)
        for row, one in enumerate(denoisers):
            limit = one.canvas.limit
            candidates[row, :limit] = torch.from_numpy(~one.canvas.masked[:limit])
        self._there, self._candidates = there.to(device), candidates.to(device)
        self._stage = self._stages[0]
        tracked = [plan.tracked for plan in plans]
        at = [one.slots[t] for one, t in zip(batch, tracked, strict=True)]
        self.tracked = (
            torch.from_numpy(np.concatenate(tracked)).to(device),
            torch.from_numpy(np.concatenate(at)).to(device),
        )
        self._tracked_rows = _padded(places(tracked, tracked)).to(device)
        self._similarity: list[torch.Tensor] = []
        self._attended: list[torch.Tensor] = []

    def see(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, past: torch.Tensor | None
    ) -> None:
        """See ``step.Observer``."""
        self._stage = stage = self._stages.get(layer, self._stage)
        pages = self._pages[layer]
        heads, _, width = pages.shape
        current = pages.read(self._tables).keys()  # a copy
        tested, before = [layer < start for start in self._starts], None
        if past is not None and any(tested):
            before = self._of(past, self._tracked_rows, current)
        current[stage.request, :, stage.position] = keys.unflatten(-1, (heads, width))
        now = self._of(queries, stage.active if before is None else stage.watched, current)
        active, tracked = now.tensor_split([stage.active.shape[1]], dim=2)
        there, most = stage.active >= 0, max(self._count)
        self._attended.append(most_attended(active, there, self._candidates, most, self._total))
        found = torch.full((len(tested),), torch.nan, device=self._device)
        if before is not None:
            self._compare(before, tracked, tested, found)
        self._similarity.append(found)

    def _of(self, queries: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Probabilities of queries [T, Hq * D] at int64 [R, K] over a layer's keys."""
        width = keys.shape[-1]
        taken = _taken(queries.unflatten(-1, (-1, width)), rows)
        return probabilities(taken, keys, width**-0.5, self._there)

    def _compare(
        self, before: torch.Tensor, now: torch.Tensor, tested: list[bool], found: torch.Tensor
    ) -> None:
        """Fill the similarity, [R], of requests that are tested, each as it wants it taken."""
        rows = self._tracked_rows >= 0
        for over in sorted(set(self._over)):
            mine = [t and one == over for t, one in zip(tested, self._over, strict=True)]
            value = similarity(before, now, rows, self._there, over, self._heads, self._total)
            found.copy_(found.where(~torch.tensor(mine, device=self._device), value))

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """After all layers: similarity [R, L] and attended int64 [R, L, most tracked]."""
        return torch.stack(self._similarity, 1), torch.stack(self._attended, 1)

    def observations(self, similarity: torch.Tensor, attended: torch.Tensor) -> list[Observation]:
        """What was seen, by request."""
        similarities, found = similarity.cpu().numpy(), attended.cpu().numpy()
        return [
            Observation(similarities[row], found[row, :, :count])
            for row, count in enumerate(self._count)
        ]


class _Rows:
    """Where active and tracked positions lie among a stage's rows, and whose each row is.

    active: int64 [R, A]. watched: int64 [R, A + K], the tracked positions behind the active ones.
    """

    def __init__(
        self, rows: Sequence[np.ndarray], plans: Sequence[Plan], device: torch.device
    ) -> None:
        request = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        self.request = torch.from_numpy(request).to(device)
        self.position = torch.from_numpy(np.concatenate(rows)).to(device)
        self.active, tracked = (
            _padded(places(rows, wanted)).to(device)
            for wanted in ([plan.active for plan in plans], [plan.tracked for plan in plans])
        )
        self.watched = torch.cat((self.active, tracked), 1)


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """int64 [R, longest], -1 behind each."""
    return pad_sequence([torch.from_numpy(row) for row in rows], True, -1)


def _taken(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows [T, H, D] at int64 [R, K] to [R, H, K, D]; anything where at is -1."""
    return x[at.clamp(min=0)].transpose(1, 2)
