# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and a budget to the bits of each unit: levels, probes, allocator."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress_common.errors import CompressError
from compress_common.store import Store, digest
from quant_methods.allocators.allocation import Allocation
from quant_methods.allocators.unit_sizes import UnitSizes
from quant_methods.architecture import architecture_of
from quant_methods.calibration.blocks import Blocks
from quant_methods.calibration.levels import build_levels, stage_name
from quant_methods.calibration.model_probe import ModelProbe
from quant_methods.calibration.precision import computed_in
from quant_methods.calibration.stages import Stages
from quant_methods.calibration.text import SELF, check_length
from quant_methods.checkpoint import Checkpoint
from quant_methods.formats.plan import Plan
from quant_methods.grid import SIXTEEN
from quant_methods.identity import tensor_digest
from quant_methods.planning import (
    calibration_blocks,
    check_decoder,
    load_model,
    stored_tokens,
)
from quant_methods.progress import Progress, silent
from quant_methods.roundings.gptq import GPTQ
from quant_methods.search_request import TARGETS, SearchRequest

KIND = "level-database"
_REVISION = 1  # raised when the same request would give another database than before
_SCALE_BYTES = 4  # a stored level has its scales in fp32


def search(
    checkpoint: Checkpoint,
    request: SearchRequest,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Allocation:
    """Return the bits of each unit for a budget.

    Every finished block of the level database and every finished part of the search is stored, so
    an interrupted search goes on where it stopped, with the same result. Another budget or method
    finds the database there.

    Args:
        checkpoint: A 16-bit checkpoint.
        request: Budget, method, levels.
        device: Where decoder blocks are computed.
        progress: Called as the work advances.

    Raises:
        CompressError: Bad input, a budget below the lowest levels, no space for the database.
    """
    config = checkpoint.hf_config
    arch, levels = architecture_of(config), request.chosen_levels()
    allocator, given = request.allocator(), request.grid_settings()
    check_decoder(checkpoint)
    plan = Plan("levels", given.grids(config))
    counted = UnitSizes.counted(plan.grids, given, levels, config)
    _check_budget(request, counted)
    request.check_text()
    check_length(request.calibration, config)

    progress("load model", 0, 1)
    dtype = computed_in(checkpoint.weight_bytes, device)
    model = load_model(checkpoint, dtype)
    tokens, text = _texts(checkpoint, request, model, progress, dtype)
    identity = {
        "revision": _REVISION,
        "grid": given.identity() | {"bits": None},
        "tokens": tensor_digest(tokens),
        "dtype": str(dtype),
    }
    key = digest(checkpoint.digest, json.dumps(identity, sort_keys=True))
    stages = Stages(key, kind=KIND, required=True)
    _check_space(stages, counted, levels, config.num_hidden_layers, request.group_size)
    blocks = calibration_blocks(checkpoint, model, tokens, device, stages, dtype)
    database = build_levels(
        plan,
        blocks,
        GPTQ(),
        lambda bits, grid: given.grid(bits, grid.group_size),
        levels,
        progress=progress,
    )
    stages = Stages(digest(key, str(levels), tensor_digest(text)), kind=KIND, required=True)
    blocks.stages = stages
    allocator.observe(blocks, database, progress)
    probe = ModelProbe(Blocks(model, arch, text, device), database)
    budget = counted.budget(request.budget)
    bits = allocator.allocate(database.losses, database.sizes, budget, probe, progress)

    def measured(bits: dict[str, int]) -> dict[str, float]:
        name = f"loss {sorted(bits.items())}"
        return {
            "bits_per_weight": round(counted.bits_per_weight(bits), 4),
            "kl_nats": round(stages.number(name, partial(probe, bits)), 6),
        }

    uniform = {}
    for done, count in enumerate(levels, start=1):
        progress("uniform levels", done, len(levels))
        uniform[str(count)] = measured(dict.fromkeys(counted.sizes, count))
    report: dict[str, Any] = {
        "method": request.method,
        "settings": allocator.settings.model_dump(mode="json"),
        "budget": request.budget,
        "target": request.target,
        "levels": list(levels),
        **measured(bits),
        "uniform": uniform,
        "calibration": request.calibration.model_dump(),
        "search_tokens": text.numel(),
        "search": allocator.report,
    }
    return Allocation(
        model=checkpoint.weights_digest,
        grid=request.shared_grid(),
        bits={unit: bits.get(unit, SIXTEEN) for unit in arch.units(config)},
        report=report,
    )


def database_folder() -> Path:
    """Return the folder of all level databases."""
    return Store().root / KIND


def _texts(
    checkpoint: Checkpoint,
    request: SearchRequest,
    model: Any,
    progress: Progress,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of calibration and those of the search, int64 [samples, length] each."""
    given, more = request.calibration, request.search_samples
    if given.source == SELF:
        other = given.model_copy(update={"seed": given.seed + 1, "samples": more})
        tokens = stored_tokens(checkpoint, given, model, progress, dtype)
        return tokens, stored_tokens(checkpoint, other, model, progress, dtype)
    every = given.model_copy(update={"samples": given.samples + more})
    tokens = stored_tokens(checkpoint, every, model, progress, dtype)
    return tokens[: given.samples].clone(), tokens[given.samples :].clone()


def _check_budget(request: SearchRequest, counted: UnitSizes) -> None:
    """Raise CompressError when the lowest levels do not fit the budget."""
    lowest, level = counted.lowest(), min(request.chosen_levels())
    if lowest <= request.budget:
        return
    lower = [bits for bits in TARGETS[request.target].levels if bits < level]
    others = [name for name, target in TARGETS.items() if min(target.default) < level]
    hint = f", or add one of the levels {', '.join(map(str, lower))}" if lower else ""
    hint += f", or give --target {others[0]}, which serves lower levels" if others else ""
    left = ", and units that stay at 16 bits" if counted.left else ""
    raise CompressError(
        f"the budget of {request.budget:g} bits per weight is below the {lowest:.2f} of the "
        f"lowest level: {level} bits with scales and zero points{left}. Raise the budget{hint}"
    )


def _check_space(
    stages: Stages, counted: UnitSizes, levels: tuple[int, ...], layers: int, group_size: int
) -> None:
    """Raise CompressError when the rest of the database does not fit the disk."""
    missing = sum(not stages.has(stage_name(levels, index)) for index in range(layers))
    stored = sum(
        cost for costs in counted.sizes.values() for bits, cost in costs.items() if bits != SIXTEEN
    )
    scales = _SCALE_BYTES * 8 / group_size * counted.weights * len(levels)
    need = (stored + scales) / 8 * missing / layers
    folder = stages.store.root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CompressError(
            f"{stages.store.root} has {free / 2**30:.1f} GiB free, the database of "
            f"{len(levels)} levels needs about {need / 2**30:.1f} GiB more; free space, give fewer "
            "levels, or set VLLM_COMPRESS_CACHE to a folder with more"
        )
