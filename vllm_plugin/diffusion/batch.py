# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch of requests, from plans to tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from dllm_denoising.base import Observation
from dllm_denoising.denoiser import Denoiser
from vllm_plugin.diffusion.graphs import Shape, fitting
from vllm_plugin.diffusion.inputs import StepInputs, size_of
from vllm_plugin.diffusion.running import Running
from vllm_plugin.diffusion.step import Stage


@dataclass(frozen=True)
class Prepared:
    """What the model needs for one step.

    Attributes:
        shape: What the step is padded to, or None.
        tokens: Tokens of the first stage, int64 [T].
        stages: The stages in order.
        rows: Positions that each request computes, by stage.
        metadata: Of attention, by stage.
        tables: Block tables, int32 [R, blocks].
        active: Places of the active positions among the rows of the last stage, int64.
    """

    shape: Shape | None
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


def shape_of(batch: Sequence[Running], layers: int, known: Iterable[Shape]) -> Shape | None:
    """Return what a step is padded to, or None: its rows change between layers, or are too many."""
    denoisers = [one.denoiser for one in batch]
    if any(0 < one.plan.start < layers for one in denoisers):
        return None
    return fitting(known, sum(next_rows(one, layers) for one in denoisers), len(batch))


def prepare(
    batch: Sequence[Running], layers: int, inputs: StepInputs, shape: Shape | None = None
) -> Prepared:
    """Turn the plans of a batch into stages, and load them.

    A stage begins at layer 0 and wherever some request begins to compute all of its positions.

    Args:
        batch: The requests.
        layers: Number of layers of the model.
        inputs: Where to.
        shape: What the step is padded to, see ``shape_of``. With it, tensors lie where those of
            each other step of this shape lie. Padded rows have no place in the cache, and padded
            requests have no rows.
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
    tokens = [one.denoiser.canvas.tokens[r] for one, r in zip(batch, rows[0], strict=True)]
    tables, lengths = _tables(batch, shape), _filled([len(one.slots) for one in batch], shape)
    arrays = [_joined(tokens, shape), tables, lengths]
    starts = {first: _starts(some, shape) for first, some in rows.items()}
    for first, some in rows.items():
        slots = [one.slots[r] for one, r in zip(batch, some, strict=True)]
        arrays += [_joined(some, shape), _joined(slots, shape, -1), starts[first]]
    # The last, as steps of one shape differ in how many there are.
    arrays.append(_joined(places(rows[firsts[-1]], [plan.active for plan in plans])))
    there = iter(inputs.load(arrays))
    loaded, table, seen = next(there), next(there), next(there)
    stages, metadata = [], {}
    for first, some in rows.items():
        stage = Stage(first, next(there), next(there))
        stages.append(stage)
        metadata[first] = CommonAttentionMetadata(
            query_start_loc=next(there),
            query_start_loc_cpu=torch.from_numpy(starts[first]),
            seq_lens=seen,
            num_reqs=len(table),
            num_actual_tokens=len(stage.slots),
            max_query_len=shape.rows if shape else max(map(len, some)),
            max_seq_len=shape.length if shape else int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=stage.slots,
            causal=False,
            positions=stage.positions,
        )
    return Prepared(shape, loaded, stages, rows, metadata, table, next(there))


def largest(rows: int, requests: int, blocks: int, stages: int) -> int:
    """Return the bytes that the inputs of a step need at most.

    Args:
        rows: The most rows of a stage.
        requests: The most requests.
        blocks: The most blocks of a request.
        stages: The most stages of a step.
    """
    stage = [8 * rows, 8 * rows, 4 * (requests + 1)]
    return size_of([8 * rows, 4 * requests * blocks, 4 * requests, *(stage * stages), 8 * rows])


def places(rows: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return where each request's wanted positions lie among the rows of all requests."""
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return [
        start + np.searchsorted(r, one) for start, r, one in zip(starts, rows, wanted, strict=True)
    ]


def advance(
    batch: Sequence[Running], found: torch.Tensor, seen: Sequence[Observation] | None
) -> list[list[int]]:
    """End the step of each request.

    Args:
        batch: The requests.
        found: Probability and token of each active position, of all requests; see
            ``prediction.predictions``. It is read back at once, which waits for the step.
        seen: What the step showed, if the policy tracks positions.

    Returns:
        Of each request, the tokens that became final.
    """
    ends = np.cumsum([len(one.denoiser.plan.active) for one in batch])[:-1]
    confidence, tokens = found.cpu().numpy()
    probable, chosen = np.split(confidence, ends), np.split(tokens.astype(np.int64), ends)
    return [
        one.denoiser.advance(probable[row], chosen[row], None if seen is None else seen[row])
        for row, one in enumerate(batch)
    ]


def _joined(
    parts: Sequence[np.ndarray], shape: Shape | None = None, padding: int = 0
) -> np.ndarray:
    """Rows of all requests, and padding up to the rows of a shape, int64."""
    joined = np.concatenate([np.empty(0, np.int64), *parts])
    missing = shape.rows - len(joined) if shape else 0
    return np.concatenate([joined, np.full(missing, padding)])


def _filled(values: Sequence[int], shape: Shape | None) -> np.ndarray:
    """A number per request, and 0 for those that a shape adds, int32."""
    filled = np.zeros(shape.requests if shape else len(values), np.int32)
    filled[: len(values)] = values
    return filled


def _starts(rows: Sequence[np.ndarray], shape: Shape | None) -> np.ndarray:
    """Where each request's rows begin, and where the last ones end, int32."""
    return np.concatenate([[0], np.cumsum(_filled([len(r) for r in rows], shape))]).astype(np.int32)


def _tables(batch: Sequence[Running], shape: Shape | None) -> np.ndarray:
    """Blocks of each request, and the null block behind them, int32."""
    width = shape.blocks if shape else max(len(one.blocks) for one in batch)
    tables = np.zeros((shape.requests if shape else len(batch), width), np.int32)
    for row, one in enumerate(batch):
        tables[row, : len(one.blocks)] = one.blocks
    return tables
