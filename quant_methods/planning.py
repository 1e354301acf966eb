# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a stored Plan: check, load, calibrate, remember."""

from pathlib import Path

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.placement import placed
from compress_common.calibration.precision import computed_in
from compress_common.calibration.stages import Stages
from compress_common.calibration.text import check_length
from compress_common.calibration.texts import stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import (
    calibration_blocks,
    check_decoder,
    load_model,
    release,
)
from compress_common.progress import Progress, both, silent
from compress_common.space import check_space
from compress_common.store import Store
from compress_common.structure.derive import structure_of
from compress_common.structure.wrapper import decoder_class
from quant_methods.calibration.routing import routing_kept
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import load_plan, save_plan
from quant_methods.plan_cost import KIND, least_seconds, plan_need
from quant_methods.plan_request import PlanRequest
from quant_methods.roundings.blockwise import round_blocks
from quant_methods.time_limit import TimeLimit

_FILE = "plan.safetensors"


def obtain_plan(
    checkpoint: Checkpoint,
    request: PlanRequest,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
    limit: TimeLimit | None = None,
) -> tuple[Plan, bool]:
    """Return the plan for a checkpoint, and whether it was stored already.

    Ranks and processes that ask at once wait for the first, and fail with its reason if it fails.
    An interrupted calibration goes on from its last finished stage.

    Args:
        checkpoint: What is quantized.
        request: How.
        device: Where decoder blocks are computed.
        progress: Called as the calibration advances.
        limit: How long a calibration may take; None: as long as it likes.

    Raises:
        CompressError: The checkpoint or the calibration text cannot be used, nothing can be
            written, or the calibration cannot end in time.
    """
    request.check_model(checkpoint)
    check_decoder(checkpoint)
    request.check_head(checkpoint)
    settings = request.build().settings
    embedding = settings.embedding_grid(checkpoint.hf_config)
    store, dtype = Store(), None
    if request.calibrates:
        dtype = computed_in(checkpoint.weight_bytes, device)
    own, key = request.keys(checkpoint, None, dtype)
    if dtype is not None and store.find(KIND, own):
        key = own  # from a processor that needs no other type: all replicas then agree
    stages = Stages(key, store)
    made: list[Plan] = []

    def build(folder: Path) -> None:
        request.check_memory(checkpoint, device)
        check_space([plan_need(checkpoint, request, stages, folder)])
        told = both(progress, store.report)
        if limit is not None and request.calibrates:
            limit.check(least_seconds(checkpoint, request, stages, device, dtype))
            told = limit.judged(told)
        plan = _calibrate(checkpoint, request, stages, device, dtype, told)
        plan.sources = checkpoint.tensor_digests
        save_plan(plan, folder / _FILE)
        made.append(plan)

    def evict() -> None:
        store.remove(KIND, key)
        checkpoint.forget_digests()

    with store.writing("the plan"):
        folder = store.make(KIND, key, build, progress)
    if made:  # the plan is in the store: its parts are not needed any more
        stages.clear()
    plan = made[0] if made else load_plan(folder / _FILE)
    plan.evict, plan.embedding, plan.names = evict, embedding, checkpoint.names
    plan.report["settings"] = settings.model_dump()
    return plan, not made


def _calibrate(
    checkpoint: Checkpoint,
    request: PlanRequest,
    stages: Stages,
    device: str | torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Plan:
    method, config = request.build(), checkpoint.hf_config
    if not request.calibrates:
        with torch.device("meta"):
            network = decoder_class(config)._from_config(config)
            plan = method.plan(Blocks(network, structure_of(config), None))
    else:
        check_length(request.calibration, config)
        progress("load model", 0, 1)
        placement = placed(device, request.sizes(checkpoint))
        model = load_model(checkpoint, dtype, placement.model)
        tokens = stored_tokens(checkpoint, request.calibration, model, progress, dtype)
        blocks = calibration_blocks(checkpoint, model, tokens, placement, stages, dtype)
        plan = method.plan(blocks, progress)
        if (rounding := method.settings.rounder()).needs_gram and not plan.codes:
            experts = method.settings.experts
            round_blocks(plan, blocks, rounding, experts=experts, progress=progress)
        if blocks.structure.has_experts:
            progress("routing", 0, 1)
            plan.report["routing"] = routing_kept(plan, blocks)
        plan.report["calibration"] = request.calibration.model_dump() | {
            "tokens": tokens.numel(),
            "dtype": str(dtype or model.dtype).removeprefix("torch."),
        }
        del model, blocks
        release(placement.device)
    plan.structure = structure = structure_of(config)
    quantized = {structure.place(name)[1] for name in plan.grids}
    left = [name for name in structure.names if name not in quantized]
    experts = {kind.experts.module for kind in structure.kinds if kind.experts is not None}
    plan.report["left_at_16_bit"] = [name for name in left if name not in structure.routed] + (
        sorted(experts) if structure.routed & set(left) else []
    )
    return plan
