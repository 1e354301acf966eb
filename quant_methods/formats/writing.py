# SPDX-License-Identifier: Apache-2.0
"""Write a quantized checkpoint shard by shard. It is complete or absent, and a run can resume."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from compress_common.calibration.memory import PROGRAM, working_memory
from compress_common.calibration.precision import check_device
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.space import Need, check_space
from compress_common.structure.derive import structure_of
from compress_common.structure.structure import HEAD
from quant_methods.formats.checkpoint_formats import FORMATS, Format
from quant_methods.formats.metadata import marker_of, write_metadata
from quant_methods.formats.modules import module_folders
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import plan_digest
from quant_methods.formats.sizes import sizes_of
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_cost import plan_need, plan_need_left
from quant_methods.planning import PlanRequest, obtain_plan

# Of source weights. While a shard is written, it is in memory twice.
_SHARD_BYTES = 1 << 30
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
    partial = target.parent / f".{target.name}.partial"
    try:
        if target.exists():
            raise CompressError(f"{target} exists; give another folder or remove it")
        request.check_head(checkpoint)
        request.check_memory(checkpoint, device)
        _check_space(partial, checkpoint, request, device)
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / ".lock", timeout=0), _kept_if_useful(partial):
            plan, _ = obtain_plan(checkpoint, request, device=device, progress=progress)
            marker = marker_of(checkpoint, plan)
            written = chosen.config(plan.grids, config, marker, plan.embedding)
            _start_or_resume(partial, request.key(checkpoint), plan, chosen)
            dtype = _serving_dtype(checkpoint.config)
            index = _write_shards(checkpoint, plan, chosen, dtype, partial, device, progress)
            report = write_metadata(checkpoint, plan, chosen, written, dtype, index, partial)
        for leftover in (".lock", "state.json"):
            (partial / leftover).unlink(missing_ok=True)
        partial.rename(target)
    except Timeout as error:
        raise CompressError(f"another process is writing {target} right now") from error
    except OSError as error:
        raise CompressError(
            f"cannot write {partial}: {error.strerror or error}; free space or give a writable "
            "--out, then run the same command again to go on"
        ) from error
    return report


@contextmanager
def _kept_if_useful(partial: Path) -> Iterator[None]:
    """Remove the working folder after a refusal, unless it holds finished shards."""
    try:
        yield
    except Exception:  # not an interruption, after which the same command goes on
        if not any(partial.glob("*.safetensors")):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_space(partial: Path, checkpoint: Checkpoint, request: PlanRequest, device: str) -> None:
    """Raise CompressError when the disk has no room for the checkpoint, or for its plan."""
    written = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    size = estimate(checkpoint, request).disk - written
    need = Need(partial.parent, size, "the checkpoint", "--out")
    try:
        check_space([need, plan_need(checkpoint, request)])
    except CompressError:  # the weights are hashed only where it matters what is there already
        check_space([need, plan_need_left(checkpoint, request, device)])


def _start_or_resume(partial: Path, key: str, plan: Plan, chosen: Format) -> None:
    """Keep finished shards of the same weights, request and plan; drop all others.

    The stored plan may be lost between two runs, and the next calibration can give another.
    """
    state = partial / "state.json"
    now = json.dumps({"request": key, "plan": plan_digest(plan), "format": chosen.name})
    if not state.is_file() or state.read_text(encoding="utf-8") != now:
        for old in partial.glob("*.safetensors"):
            old.unlink()
        state.write_text(now, encoding="utf-8")


def _serving_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype to write: fp16 stays fp16, everything else becomes bf16."""
    parts = config, config.get("text_config") or {}
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return _DTYPES.get(next((str(name) for name in named if name), ""), torch.bfloat16)


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


def _shards(checkpoint: Checkpoint, names: list[str]) -> Iterator[list[str]]:
    """Cut tensor names into runs of about a gigabyte."""
    sizes = checkpoint.shapes()
    shard: list[str] = []
    size = 0
    for name in names:
        if size and size + sizes[name][1] > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += sizes[name][1]
    yield shard


def _write_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    chosen: Format,
    dtype: torch.dtype,
    folder: Path,
    device: str,
    progress: Progress,
) -> dict[str, str]:
    """Write every shard that is not there yet. Returns ``{tensor: file}``."""
    shards = list(_shards(checkpoint, _written(checkpoint, plan)))
    mode = stat.S_IMODE((folder / "state.json").stat().st_mode)  # as the umask has it
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        progress("write", number - 1, len(shards))
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.is_file():
            out: dict[str, torch.Tensor] = {}
            stream = checkpoint.tensors(names)
            for name, value in plan.transform(stream, dtype, device=device, expected=names):
                if isinstance(value, QuantizedWeight):
                    parts = chosen.tensors(value, dtype)
                    out |= {f"{name}.{part}": t.cpu() for part, t in parts.items()}
                else:
                    out[name] = _stored(value, dtype, checkpoint.names.inner(name) is None).cpu()
            out = {name: tensor.contiguous() for name, tensor in out.items()}
            save_file(out, file.with_suffix(".tmp"), metadata={"format": "pt"})
            file.with_suffix(".tmp").chmod(mode)  # save_file makes files that only we can read
            os.replace(file.with_suffix(".tmp"), file)
        index |= dict.fromkeys(Checkpoint.names_in(file), file.name)
    progress("write", len(shards), len(shards))
    return index


def _stored(value: torch.Tensor, dtype: torch.dtype, tower: bool) -> torch.Tensor:
    """Return a tensor that is not quantized as it is written.

    What lies beside the language model stays as it is. So do vectors: a bias of a router decides by
    differences that 16 bits can lose, and vLLM holds it in float32.
    """
    return value if tower or value.dim() < 2 or not value.is_floating_point() else value.to(dtype)
