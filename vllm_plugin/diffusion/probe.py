# SPDX-License-Identifier: Apache-2.0
"""Watches where attention goes in a step, from the queries and keys of a few rows.

Attention kernels return no probabilities. Those of tracked and active rows are computed here again,
from queries and keys as they go into the kernel: a few rows against the keys of their request. A
group of requests and a part of their rows is computed at a time, so that the memory it takes does
not grow with what requests ask for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from dllm_denoising.base import Observation, Plan
from dllm_denoising.drift import (
    Over,
    Total,
    attention_mass,
    cosines,
    most_attended,
    probabilities,
    similarity,
)
from dllm_denoising.memory import StepMemory, groups
from vllm_plugin.diffusion.batch import Prepared, places
from vllm_plugin.diffusion.running import Running
from vllm_plugin.kv_cache.pages import Pages


class Probe:
    """Collects a batch's observations, layer by layer."""

    def __init__(
        self,
        batch: Sequence[Running],
        prepared: Prepared,
        pages: Sequence[Pages],
        memory: StepMemory,
        heads: int,
        total: Total,
    ) -> None:
        """Prepare for one step.

        Args:
            batch: R requests.
            prepared: Their step.
            pages: Of each layer.
            memory: Says how much is computed at a time.
            heads: Query heads of all ranks.
            total: Sums a tensor over ranks.
        """
        self._pages, self._memory, self._heads, self._total = pages, memory, heads, total
        denoisers = [one.denoiser for one in batch]
        self._count = [one.policy.tracks for one in denoisers]
        self._device = prepared.tables.device
        block_size = pages[0].shape[1]
        padded = [len(one.blocks) * block_size for one in batch]
        self._groups = [
            _Group(batch, prepared, requests, block_size)
            for requests in groups(padded, memory.watched_requests)
        ]
        tracked = [one.plan.tracked for one in denoisers]
        at = [one.slots[t] for one, t in zip(batch, tracked, strict=True)]
        self.tracked = (
            torch.from_numpy(np.concatenate(tracked)).to(self._device),
            torch.from_numpy(np.concatenate(at)).to(self._device),
        )
        self._similarity: list[torch.Tensor] = []
        self._attended: list[torch.Tensor] = []

    def see(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, past: torch.Tensor | None
    ) -> None:
        """Watch one layer; see ``step.Observer``."""
        heads, _, width = self._pages[layer].shape
        queries, keys = queries.unflatten(-1, (-1, width)), keys.unflatten(-1, (heads, width))
        if past is not None:
            past = past.unflatten(-1, (-1, width))
        seen = [self._watch(group, layer, queries, keys, past) for group in self._groups]
        similar, attended = zip(*seen, strict=True)
        self._similarity.append(torch.cat(similar))
        self._attended.append(torch.cat(attended))

    def _watch(
        self,
        group: "_Group",
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        past: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarity [G] and attended int64 [G, most tracked] of a group of G requests.

        Queries, keys and past queries are [T, heads, D].
        """
        rows = group.rows(layer)
        old = self._pages[layer].keys(group.tables).float()
        compared = past is not None and any(layer < start for start in group.starts)
        new = old.clone() if compared else old
        new[rows.request, :, rows.position] = keys[rows.span].float()
        size = self._memory.watched_rows(*group.there.shape)
        mass = torch.zeros(group.there.shape, device=self._device)
        for at in rows.active.split(size, 1):
            mass += attention_mass(group.probabilities(queries, at, new), at >= 0)
        attended = most_attended(self._total(mass), group.candidates, max(self._count))
        found = torch.full((len(old),), torch.nan, device=self._device)
        if not compared:
            return found, attended
        assert past is not None
        there = group.tracked >= 0
        sums = {over: torch.zeros_like(found) for over in sorted(set(group.over))}
        for was, now in zip(group.tracked.split(size, 1), rows.tracked.split(size, 1), strict=True):
            before = group.probabilities(past, was, old)
            current = group.probabilities(queries, now, new)
            for over, value in sums.items():
                value += cosines(before, current, was >= 0, group.there, over, self._total)
        for over, value in sums.items():
            mine = [
                layer < start and one == over
                for start, one in zip(group.starts, group.over, strict=True)
            ]
            mean = similarity(value, there, group.there, over, self._heads)
            found = found.where(~torch.tensor(mine, device=self._device), mean)
        return found, attended

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, after all layers, similarity [R, L] and attended int64 [R, L, most tracked]."""
        return torch.stack(self._similarity, 1), torch.stack(self._attended, 1)

    def observations(self, similarity: torch.Tensor, attended: torch.Tensor) -> list[Observation]:
        """Return what was seen of each request."""
        similarities, found = similarity.cpu().numpy(), attended.cpu().numpy()
        return [
            Observation(similarities[row], found[row, :, :count])
            for row, count in enumerate(self._count)
        ]


class _Group:
    """Neighbors in a batch that are watched together, padded to N positions.

    tables: int64 [G, blocks]. there: bool [G, N]. candidates: bool [G, N], positions that can be
    tracked. tracked: int64 [G, K], where their tracked positions lie among those of the batch.
    """

    def __init__(
        self, batch: Sequence[Running], prepared: Prepared, requests: slice, block_size: int
    ) -> None:
        mine = batch[requests]
        canvases = [one.denoiser.canvas for one in mine]
        plans = [one.denoiser.plan for one in batch]
        device = prepared.tables.device
        self.starts = [plan.start for plan in plans[requests]]
        self.over: list[Over] = [one.denoiser.policy.settings.similarity for one in mine]
        width = max(len(one.blocks) for one in mine)
        self.tables = prepared.tables[requests, :width].long()
        length = width * block_size
        there = torch.arange(length) < torch.tensor([len(one) for one in canvases])[:, None]
        candidates = torch.zeros_like(there)
        for row, canvas in enumerate(canvases):
            candidates[row, : canvas.limit] = torch.from_numpy(~canvas.masked[: canvas.limit])
        self.there, self.candidates = there.to(device), candidates.to(device)
        tracked = [plan.tracked for plan in plans]
        self.tracked = _padded(places(tracked, tracked)[requests]).to(device)
        self._stages = {
            first: _Rows(rows, plans, requests, device) for first, rows in prepared.rows.items()
        }

    def rows(self, layer: int) -> "_Rows":
        """Return the group's rows of the stage that a layer belongs to."""
        return self._stages[max(first for first in self._stages if first <= layer)]

    def probabilities(
        self, queries: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Return probabilities [G, Hq, K, N] over keys [G, Hkv, N, D].

        Those of queries [T, Hq, D] at rows, int64 [G, K]; anything where a row is -1.
        """
        taken = queries[rows.clamp(min=0)].transpose(1, 2)
        return probabilities(taken, keys, keys.shape[-1] ** -0.5, self.there)


class _Rows:
    """A group's rows among those of a stage.

    span: where they are. request, position: int64, of each of them, in the group and in its
    request. active, tracked: int64 [G, A] and [G, K], where these positions lie in the stage.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        plans: Sequence[Plan],
        requests: slice,
        device: torch.device,
    ) -> None:
        counts = [len(one) for one in rows]
        first, mine = sum(counts[: requests.start]), counts[requests]
        self.span = slice(first, first + sum(mine))
        self.request = torch.from_numpy(np.repeat(np.arange(len(mine)), mine)).to(device)
        self.position = torch.from_numpy(np.concatenate(rows[requests])).to(device)
        self.active, self.tracked = (
            _padded(places(rows, wanted)[requests]).to(device)
            for wanted in ([plan.active for plan in plans], [plan.tracked for plan in plans])
        )


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """int64 [R, longest], -1 behind each."""
    return pad_sequence([torch.from_numpy(row) for row in rows], True, -1)
