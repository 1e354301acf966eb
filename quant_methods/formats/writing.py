# SPDX-License-Identifier: Apache-2.0
"""Write a quantized checkpoint shard by shard. It is complete or absent, and a run can resume."""

import functools
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from compress_common.calibration.memory import PROGRAM, working_memory
from compress_common.calibration.precision import check_device
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.companions import module_folders
from compress_common.checkpoints.partial import Partial
from compress_common.checkpoints.shards import cut_into_shards, serving_dtype, write_shards
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.space import Need, check_space
from compress_common.structure.derive import structure_of
from compress_common.structure.structure import HEAD
from quant_methods.formats.checkpoint_formats import FORMATS, Format
from quant_methods.formats.metadata import marker_of, write_metadata
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import plan_digest
from quant_methods.formats.sizes import sizes_of
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_cost import plan_need, plan_need_left
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run needs.

    Attributes:
        memory: Peak of the process.
        program: What Python, torch and transformers take of it.
        disk: Of the quantized checkpoint.
    """

    memory: int
    program: int
    disk: int


def estimate(
    checkpoint: Checkpoint, request: PlanRequest, device: str | torch.device = "cpu"
) -> Estimate:
    """Estimate memory as the program, the model and fp32 copies of one block, disk as the files.

    Args:
        checkpoint: What is quantized.
        request: How.
        device: Where decoder blocks are computed.

    Raises:
        CompressError: The model cannot be quantized so.
    """
    request.check_model(checkpoint)
    config = checkpoint.hf_config
    structure_of(config)
    settings = request.build().settings
    grids, embedding = settings.grids(config), settings.embedding_grid(config)
    total = checkpoint.weight_bytes
    compressed = sizes_of(checkpoint, grids, tied=False, embedding=embedding)
    own, mapped = working_memory(checkpoint, device, calibrates=request.calibrates)
    saved = compressed.original - compressed.compressed()
    for name, (shape, size) in checkpoint.shapes().items():
        if checkpoint.names.inner(name) is not None:  # the decoder is written in 16 bits
            saved += max(0, size - 2 * prod(shape))
    return Estimate(memory=own + mapped, program=PROGRAM, disk=max(total - saved, total // 16))


def quantize_checkpoint(
    source: Path,
    target: Path,
    request: PlanRequest,
    *,
    format_name: str = "compressed-tensors",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize a checkpoint into a new folder.

    Work goes to ``.<target>.partial`` beside the target and is renamed at the end. A later run with
    the same request on the same weights goes on where an interrupted one stopped. A refused run
    leaves nothing.

    Args:
        source: Folder of a 16-bit checkpoint.
        target: Folder that must not exist yet.
        request: How it is quantized.
        format_name: A key of ``FORMATS``.
        device: Where decoder blocks are computed.
        progress: Called as the work advances.

    Returns:
        The report, which is written to ``report.json`` too.

    Raises:
        CompressError: Bad input, an existing target, or a folder that cannot be written.
    """
    check_device(device)
    if format_name not in FORMATS:
        raise CompressError(f"unknown format {format_name!r}; valid: {', '.join(FORMATS)}")
    chosen = FORMATS[format_name]
    if chosen.uniform:
        request = request.model_copy(update={"settings": request.settings | {"uniform": True}})
    checkpoint = Checkpoint(source)
    settings, config = request.build().settings, checkpoint.hf_config
    # Refuses what cannot be written before the work, not after it.
    chosen.config(settings.grids(config), config, {}, settings.embedding_grid(config))
    module_folders(source)
    partial = Partial(target)
    request.check_head(checkpoint)
    request.check_memory(checkpoint, device)
    _check_space(partial, checkpoint, request, device)
    with partial.writing():
        plan, _ = obtain_plan(checkpoint, request, device=device, progress=progress)
        marker = marker_of(checkpoint, plan)
        written = chosen.config(plan.grids, config, marker, plan.embedding)
        # The stored plan may be lost between two runs, and the next calibration can give another.
        identity = {"request": request.key(checkpoint), "plan": plan_digest(plan)}
        partial.start_or_resume(identity | {"format": chosen.name})
        dtype, names = serving_dtype(checkpoint.config), _written(checkpoint, plan)
        sizes = {name: size for name, (_, size) in checkpoint.shapes().items()}
        tensors = functools.partial(_quantized, checkpoint, plan, chosen, dtype, device)
        index = write_shards(cut_into_shards(names, sizes), tensors, partial.folder, progress)
        report = write_metadata(checkpoint, plan, chosen, written, dtype, index, partial.folder)
    return report


def _check_space(
    partial: Partial, checkpoint: Checkpoint, request: PlanRequest, device: str
) -> None:
    """Raise CompressError when the disk has no room for the checkpoint, or for its plan."""
    size = estimate(checkpoint, request).disk - partial.written
    need = Need(partial.folder.parent, size, "the checkpoint", "--out")
    try:
        check_space([need, plan_need(checkpoint, request)])
    except CompressError:  # the weights are hashed only where it matters what is there already
        check_space([need, plan_need_left(checkpoint, request, device)])


def _written(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Name the tensors to write, in checkpoint order.

    The second copy of a tied embedding is left out if it would be quantized: vLLM ties such a pair
    again only at 16 bits, and would hold both.
    """
    key = "tie_word_embeddings"
    tied = plan.config.get(key, getattr(checkpoint.hf_config, key, False))
    once = plan.embedding is not None and tied and not checkpoint.own_head
    head = f"{checkpoint.names.outer(HEAD)}.weight"
    return [name for name in checkpoint.files if not (once and name == head)]


def _quantized(
    checkpoint: Checkpoint,
    plan: Plan,
    chosen: Format,
    dtype: torch.dtype,
    device: str,
    names: list[str],
) -> dict[str, torch.Tensor]:
    """Return what is written for the tensors ``names`` of one shard."""
    out: dict[str, torch.Tensor] = {}
    stream = checkpoint.tensors(names)
    for name, value in plan.transform(stream, dtype, device=device, expected=names):
        if isinstance(value, QuantizedWeight):
            parts = chosen.tensors(value, dtype)
            out |= {f"{name}.{part}": t.cpu() for part, t in parts.items()}
        else:
            out[name] = _stored(value, dtype, checkpoint.names.inner(name) is None).cpu()
    return out


def _stored(value: torch.Tensor, dtype: torch.dtype, tower: bool) -> torch.Tensor:
    """Return a tensor that is not quantized as it is written.

    What lies beside the language model stays as it is. So do vectors: a bias of a router decides by
    differences that 16 bits can lose, and vLLM holds it in float32.
    """
    return value if tower or value.dim() < 2 or not value.is_floating_point() else value.to(dtype)
