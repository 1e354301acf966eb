# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch of requests, from plans to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from dllm_denoising.base import Observation
from dllm_denoising.denoiser import Denoiser
from vllm_plugin.diffusion.running import Running
from vllm_plugin.diffusion.step import Stage


@dataclass(frozen=True)
class Prepared:
    """What the model needs for one step.

    Attributes:
        tokens: Tokens of the first stage, int64 [T].
        stages: The stages in order.
        rows: Positions that each request computes, by stage.
        metadata: Of attention, by stage.
        tables: Block tables, int64 [R, blocks].
        active: Places of the active positions among the rows of the last stage, int64.
    """

    tokens: torch.Tensor
    stages: list[Stage]
    rows: dict[int, list[np.ndarray]]
    metadata: dict[int, CommonAttentionMetadata]
    tables: torch.Tensor
    active: torch.Tensor


def next_rows(denoiser: Denoiser, layers: int) -> int:
    """Return how much the next step takes of the token budget: its rows in the largest layer."""
    plan = denoiser.plan
    return len(plan.rows) if plan.start >= layers else len(denoiser.canvas)


def prepare(batch: Sequence[Running], layers: int, device: torch.device) -> Prepared:
    """Turn the plans of a batch into stages.

    A stage begins at layer 0 and wherever some request begins to compute all of its positions.
    """
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
    """Return where each request's wanted positions lie among the rows of all requests."""
    starts = np.cumsum([0, *(len(r) for r in rows[:-1])])
    return [
        start + np.searchsorted(r, one) for start, r, one in zip(starts, rows, wanted, strict=True)
    ]


def advance(
    batch: Sequence[Running],
    confidence: torch.Tensor,
    tokens: torch.Tensor,
    seen: Sequence[Observation] | None,
) -> list[list[int]]:
    """End the step of each request.

    Args:
        batch: The requests.
        confidence: Probability of each active position's token, of all requests, float64 [M].
        tokens: Those tokens, int64 [M].
        seen: What the step showed, if the policy tracks positions.

    Returns:
        Of each request, the tokens that became final.
    """
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
