# SPDX-License-Identifier: Apache-2.0
"""The requests that a worker denoises: one step of some of them, from plans to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from dllm_denoising.base import Observation
from dllm_denoising.commit import predict
from dllm_denoising.denoiser import Denoiser
from vllm_plugin.diffusion.step import Stage


@dataclass(frozen=True)
class Running:
    """A request. blocks: of its whole canvas, reserved when it was admitted. slots: int64 [N]."""

    denoiser: Denoiser
    blocks: np.ndarray
    slots: np.ndarray

    @classmethod
    def of(cls, denoiser: Denoiser, blocks: Sequence[int], block_size: int) -> "Running":
        at = np.arange(len(denoiser.canvas))
        table = np.asarray(blocks, dtype=np.int64)
        return cls(denoiser, table, table[at // block_size] * block_size + at % block_size)


@dataclass(frozen=True)
class Prepared:
    """What the model needs for one step.

    tokens: int64 [T], of the first stage. rows: of each request, by stage. active: int64, places
    of the active positions among the last stage's rows.
    """

    tokens: torch.Tensor
    stages: list[Stage]
    rows: dict[int, list[np.ndarray]]
    metadata: dict[int, CommonAttentionMetadata]
    tables: torch.Tensor
    active: torch.Tensor


def next_rows(denoiser: Denoiser, layers: int) -> int:
    """Rows of the next step in the layer that computes most: what it takes of the token budget."""
    plan = denoiser.plan
    return len(plan.rows) if plan.start >= layers else len(denoiser.canvas)


def prepare(batch: Sequence[Running], layers: int, device: torch.device) -> Prepared:
    """Lay the plans of a batch out as stages: one more where requests begin to compute all."""
    plans = [one.denoiser.plan for one in batch]
    firsts = sorted({0, *(plan.start for plan in plans if plan.start < layers)})
    rows = {
        first: [
            np.arange(len(one.denoiser.canvas)) if plan.start <= first else plan.rows
            for one, plan in zip(batch, plans, strict=True)
        ]
        for first in firsts
    }
    tables = _tables(batch).to(device)
    stages, metadata = [], {}
    for first in firsts:
        positions = np.concatenate(rows[first])
        slots = np.concatenate([o.slots[r] for o, r in zip(batch, rows[first], strict=True)])
        stage = Stage(first, *(torch.from_numpy(x).to(device) for x in (positions, slots)))
        stages.append(stage)
        metadata[first] = _metadata(batch, rows[first], stage, tables)
    tokens = [o.denoiser.canvas.tokens[r] for o, r in zip(batch, rows[0], strict=True)]
    active = places(rows[firsts[-1]], [plan.active for plan in plans])
    return Prepared(
        torch.from_numpy(np.concatenate(tokens)).to(device),
        stages,
        rows,
        metadata,
        tables,
        torch.from_numpy(np.concatenate(active)).to(device),
    )


def places(rows: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Where each request's wanted positions lie among the rows of all, one after the other."""
    starts = np.cumsum([0, *(len(r) for r in rows[:-1])])
    return [
        start + np.searchsorted(r, one) for start, r, one in zip(starts, rows, wanted, strict=True)
    ]


def predictions(
    batch: Sequence[Running], logits: torch.Tensor, mask: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability and token of each active position, those of one request after the other."""
    noise = [one.denoiser.noise(logits.shape[1]) for one in batch]
    if all(one is None for one in noise):
        return predict(logits, mask)
    parts = logits.split([len(one.denoiser.plan.active) for one in batch])
    found = [
        predict(part, mask, None if n is None else n.to(part.device))
        for part, n in zip(parts, noise, strict=True)
    ]
    confidence, tokens = zip(*found, strict=True)
    return torch.cat(confidence), torch.cat(tokens)


def advance(
    batch: Sequence[Running],
    confidence: torch.Tensor,
    tokens: torch.Tensor,
    seen: Sequence[Observation] | None,
) -> list[list[int]]:
    """End the step of each request; the tokens that became final."""
    ends = np.cumsum([len(one.denoiser.plan.active) for one in batch])[:-1]
    probable, chosen = (np.split(x.cpu().numpy(), ends) for x in (confidence, tokens))
    return [
        one.denoiser.advance(probable[row], chosen[row], None if seen is None else seen[row])
        for row, one in enumerate(batch)
    ]


def _tables(batch: Sequence[Running]) -> torch.Tensor:
    width = max(len(one.blocks) for one in batch)
    tables = np.zeros((len(batch), width), dtype=np.int64)
    for row, one in enumerate(batch):
        tables[row, : len(one.blocks)] = one.blocks
    return torch.from_numpy(tables)


def _metadata(
    batch: Sequence[Running], rows: Sequence[np.ndarray], stage: Stage, tables: torch.Tensor
) -> CommonAttentionMetadata:
    counts = [len(r) for r in rows]
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    lengths = torch.tensor([len(one.slots) for one in batch], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(tables.device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(tables.device),
        num_reqs=len(batch),
        num_actual_tokens=len(stage.slots),
        max_query_len=max(counts),
        max_seq_len=int(lengths.max()),
        block_table_tensor=tables.int(),
        slot_mapping=stage.slots,
        causal=False,
        positions=stage.positions,
    )
