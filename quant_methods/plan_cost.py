# SPDX-License-Identifier: Apache-2.0
"""What a calibration will cost: the disk of its result and its stages, and its least time."""

from dataclasses import replace
from pathlib import Path

import torch

from compress_common.calibration.precision import computed_in
from compress_common.calibration.stages import Stages
from compress_common.calibration.texts import known_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.space import Need
from compress_common.store import Store
from compress_common.structure.derive import structure_of
from quant_methods.formats.packed import packed_bytes
from quant_methods.plan_request import PlanRequest
from quant_methods.roundings.base import Rounding
from quant_methods.time_limit import least_operations, operations_per_second

KIND = "plan"  # of the store


def plan_need(
    checkpoint: Checkpoint,
    request: PlanRequest,
    stages: Stages | None = None,
    folder: Path | None = None,
) -> Need:
    """Return the space that a calibration takes in the cache: its stages, and the plan of them.

    Args:
        checkpoint: What is quantized.
        request: How.
        stages: Where blocks that are finished already are; None: none is.
        folder: Where the plan is built; None: where the store would build it.
    """
    settings, config = request.build().settings, checkpoint.hf_config
    rounding, size, left = settings.rounder(), 0.0, 1.0
    store = Store()
    folder = folder or store.place(KIND)
    if store.root in (folder, *folder.parents):
        folder = store.root
    else:  # stages are kept in the root only
        left = 0.0
    if rounding.needs_gram:
        structure, grids = structure_of(config), settings.grids(config)
        size = sum(packed_bytes(grid, *structure.shape(n)) for n, grid in grids.items())
        if stages is not None:
            left *= _unfinished(checkpoint, rounding, stages)
    return Need(folder, size + size * left, "the rounded weights", "VLLM_COMPRESS_CACHE")


def plan_need_left(
    checkpoint: Checkpoint, request: PlanRequest, device: str | torch.device = "cpu"
) -> Need:
    """Return ``plan_need`` less what earlier runs have left. Every byte of the weights is hashed.

    Args:
        checkpoint: What is quantized.
        request: How.
        device: Where decoder blocks are computed.
    """
    dtype = computed_in(checkpoint.weight_bytes, device) if request.calibrates else None
    store, keys = Store(), request.keys(checkpoint, None, dtype)
    need = plan_need(checkpoint, request, Stages(keys[-1], store))
    return replace(need, size=0) if any(store.find(KIND, key) for key in keys) else need


def least_seconds(
    checkpoint: Checkpoint,
    request: PlanRequest,
    stages: Stages,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> float:
    """Return the seconds that a calibration takes on a device at the least."""
    rounding = request.build().settings.rounder()
    operations = least_operations(
        checkpoint.hf_config,
        request.tokens,
        sampled=known_tokens(checkpoint, request.calibration, dtype) is None,
        gram=rounding.needs_gram,
    )
    speed = operations_per_second(torch.device(device), dtype or torch.bfloat16)
    return operations / speed * _unfinished(checkpoint, rounding, stages)


def _unfinished(checkpoint: Checkpoint, rounding: Rounding, stages: Stages) -> float:
    """Return the share of the blocks that were not rounded by earlier runs."""
    layers = range(checkpoint.hf_config.num_hidden_layers)
    return sum(not stages.has(f"{rounding.name} {index}") for index in layers) / len(layers)
