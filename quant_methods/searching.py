# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and a budget to the bits of each unit: levels, probes, allocator."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress_common.calibration.memory import check_memory
from compress_common.calibration.placement import placed
from compress_common.calibration.precision import check_device, computed_in
from compress_common.calibration.stages import Stages
from compress_common.calibration.text import SELF, CalibrationSettings, check_length
from compress_common.calibration.texts import known_tokens, stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.identity import tensor_digest
from compress_common.checkpoints.loading import calibration_blocks, check_decoder, load_model
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.space import Need, check_space
from compress_common.store import Store, digest
from compress_common.structure.derive import structure_of
from quant_methods.allocators.allocation import Allocation
from quant_methods.allocators.unit_sizes import UnitSizes
from quant_methods.base import GridSettings
from quant_methods.calibration.levels import build_levels, stage_name
from quant_methods.calibration.model_probe import ModelProbe
from quant_methods.formats.packed import packed_bytes
from quant_methods.formats.plan import Plan
from quant_methods.grid import SIXTEEN
from quant_methods.roundings.gptq import GPTQ
from quant_methods.search_request import TARGETS, SearchRequest

KIND = "level-database"
_REVISION = 3  # raised when the same request would give another database than before


def search(
    checkpoint: Checkpoint,
    request: SearchRequest,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
    images: Callable[[Progress], Sequence[torch.Tensor]] | None = None,
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
        images: Returns ``Allocator.images`` of the chats that ``request.images`` names; None where
            it names none.

    Raises:
        CompressError: Bad input, a budget below the lowest levels, no space for the database.
    """
    assert (images is None) == (request.images is None), "images are asked for and not given"
    check_device(device)
    config = checkpoint.hf_config
    structure, levels = structure_of(config), request.chosen_levels()
    allocator, given = request.allocator(), request.grid_settings()
    check_decoder(checkpoint)
    if not checkpoint.has_head:
        raise CompressError(
            f"{checkpoint.folder} has no language-model head, by whose logits bits are compared; "
            "quantize it without a search"
        )
    plan = Plan("levels", given.grids(config))
    _check_levels(given, levels, config)
    counted = UnitSizes.counted(plan.grids, given, levels, config)
    _check_budget(request, counted)
    request.check_text()
    check_length(request.calibration, config)

    dtype = computed_in(checkpoint.weight_bytes, device)
    probed = request.search_samples * request.calibration.length * config.num_hidden_layers
    check_memory(checkpoint, device, states=probed)
    sizes = request.sizes(checkpoint)
    placed(device, sizes)  # refuses before the weights are hashed
    known = _texts(request, lambda wanted: known_tokens(checkpoint, wanted, dtype))
    stages = None
    if known is not None:
        stages = Stages(_key(checkpoint, given, known[0], dtype), kind=KIND, required=True)
    layers = range(config.num_hidden_layers)
    kept = sum(stages is not None and stages.has(stage_name(levels, i)) for i in layers)
    _check_space(kept, plan, given, levels, config)
    if kept:
        progress("found levels", kept, len(layers))

    allocator.images = None if images is None else images(progress)  # before the other model
    progress("load model", 0, 1)
    placement = placed(device, sizes)
    model = load_model(checkpoint, dtype, placement.model)
    texts = known or _texts(
        request, lambda wanted: stored_tokens(checkpoint, wanted, model, progress, dtype)
    )
    assert texts is not None  # what is not stored was sampled
    tokens, text = texts
    key = _key(checkpoint, given, tokens, dtype)
    stages = Stages(key, kind=KIND, required=True)
    blocks = calibration_blocks(checkpoint, model, tokens, placement, stages, dtype)
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
    probe = ModelProbe(blocks.on(text), database)
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
        "images": None if request.images is None else request.images.model_dump(),
        "search": allocator.report,
    }
    return Allocation(
        model=checkpoint.weights_digest,
        grid=request.shared_grid(),
        bits={unit: bits.get(unit, SIXTEEN) for unit in structure.all_units},
        report=report,
    )


def database_folder() -> Path:
    """Return the folder of all level databases."""
    return Store().root / KIND


def _key(
    checkpoint: Checkpoint, given: GridSettings, tokens: torch.Tensor, dtype: torch.dtype | None
) -> str:
    """Return the key of a level database."""
    identity = {
        "revision": _REVISION,
        "grid": given.identity() | {"bits": None},
        "tokens": tensor_digest(tokens),
        "dtype": str(dtype),
    }
    return digest(checkpoint.digest, json.dumps(identity, sort_keys=True))


def _texts(
    request: SearchRequest, read: Callable[[CalibrationSettings], torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the tokens of calibration and those of the search, int64 [samples, length] each.

    Args:
        request: Has the settings of both.
        read: Returns tokens; None: they are not there, and neither is the result.
    """
    given, more = request.calibration, request.search_samples
    if given.source == SELF:
        other = given.model_copy(update={"seed": given.seed + 1, "samples": more})
        tokens, text = read(given), read(other)
        return None if tokens is None or text is None else (tokens, text)
    every = read(given.model_copy(update={"samples": given.samples + more}))
    if every is None:
        return None
    return every[: given.samples].clone(), every[given.samples :].clone()


def _check_levels(given: GridSettings, levels: tuple[int, ...], config: Any) -> None:
    """Raise CompressError when linears of one level do not pack at another."""
    packed = {
        bits: given.model_copy(update={"bits": bits}).grids(config).keys()
        for bits in levels
        if bits != SIXTEEN
    }
    every = set().union(*packed.values())
    for bits, linears in packed.items():
        if left := sorted(every - linears):
            raise CompressError(
                f"the channels of {left[0]} on {given.tensor_parallel} ranks do not pack in {bits} "
                "bits; leave the level out with --levels"
            )


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
    kept: int,
    plan: Plan,
    given: GridSettings,
    levels: tuple[int, ...],
    config: Any,
) -> None:
    """Raise CompressError when the rest of the database cannot be kept, or does not fit the disk.

    Args:
        kept: Blocks that are finished already.
        plan: Has the linears that are quantized.
        given: Say what the grid of a level is.
        levels: Bits that a unit may have.
        config: The text model's ``transformers`` config.
    """
    structure, layers = structure_of(config), config.num_hidden_layers
    missing = layers - kept
    store = Store()
    if missing and store.place(KIND) != store.root:  # another place would not outlast the process
        raise CompressError(
            f"cannot keep the work in {store.root}; set VLLM_COMPRESS_CACHE to a folder with free "
            "space that only this user can write"
        )
    size = sum(
        packed_bytes(given.grid(bits, grid.group_size), *structure.shape(linear))
        for linear, grid in plan.grids.items()
        for bits in levels
        if bits != SIXTEEN
    )
    what = f"the database of {len(levels)} levels"
    need = Need(store.root, size * missing / layers, what, "VLLM_COMPRESS_CACHE")
    try:
        check_space([need])
    except CompressError as error:
        raise CompressError(f"{error}, or give fewer levels") from error
