# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that has only some of the blocks of another one, in the same format."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.companions import copy_companions
from compress_common.checkpoints.identity import hashed
from compress_common.checkpoints.shards import cut_into_shards, write_index, write_shards
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from depth_pruning.cutting import MARKER, kept_blocks, renamed
from depth_pruning.healers.base import Healed


def marker_of(checkpoint: Checkpoint, dropped: tuple[int, ...], heal: str) -> dict[str, Any]:
    """Return what config.json notes of a pruned checkpoint.

    The note of a source that was pruned already is kept in it, as ``before``.

    Args:
        checkpoint: What was pruned.
        dropped: Indices of the blocks that are gone.
        heal: Name of the healer.
    """
    marker = {
        "schema": 1,
        "source": checkpoint.weights_digest,
        "source_layers": checkpoint.hf_config.num_hidden_layers,
        "dropped": list(dropped),
        "heal": heal,
    }
    before = getattr(checkpoint.hf_config, MARKER, None)
    return marker if before is None else marker | {"before": before}


def write_pruned(
    checkpoint: Checkpoint,
    dropped: tuple[int, ...],
    healed: Healed,
    config: dict[str, Any],
    report: dict[str, Any],
    folder: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fill a folder with a checkpoint. Returns its report.

    Tensors keep their type. Those that are not healed keep every bit.

    Args:
        checkpoint: What is pruned.
        dropped: Indices of the blocks that are gone.
        healed: New weights, by block and linear of the source.
        config: The new config.json.
        report: What is known of the search and the loss.
        folder: Of a ``Partial``.
        progress: Called for each shard.
    """
    structure, names = structure_of(checkpoint.hf_config), checkpoint.names
    kept = kept_blocks(structure.depth, dropped)
    new = {
        names.outer(f"{structure.layers}.{index}.{linear}.weight"): weight
        for index, linears in healed.items()
        for linear, weight in linears.items()
    }
    prefix = names.outer(f"{structure.layers}.")
    rename = functools.partial(renamed, prefix=prefix, kept=kept, depth=structure.depth)
    size = write_tensors(checkpoint, rename, folder, new, progress)
    report = {
        "method": "prune",
        "dropped": list(dropped),
        "layers_before": structure.depth,
        "layers_after": len(kept),
        "weight_bytes_before": checkpoint.weight_bytes,
        "weight_bytes_after": size,
        "healed_linears": len(new),
        **report,
    }
    complete(checkpoint.folder, config, report, folder)
    return report


def write_tensors(
    checkpoint: Checkpoint,
    rename: Callable[[str], str | None],
    folder: Path,
    new: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = silent,
) -> int:
    """Write the shards and the index. Returns the bytes of the tensors.

    Args:
        checkpoint: Where the tensors come from.
        rename: Returns the new name of a tensor; None: it is not written.
        folder: Of a ``Partial``.
        new: Takes the place of tensors, by their name in the source.
        progress: Called for each shard.
    """
    sizes = {name: size for name, (_, size) in checkpoint.shapes().items()}
    expected, given = checkpoint.tensor_digests, new or {}

    def tensors(names: list[str]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor, found in hashed(checkpoint.tensors(names)):
            if found != expected[name]:
                raise CompressError(
                    f"{checkpoint.folder} changed while it was in use ({name}); wait until the "
                    "checkpoint is complete and start again"
                )
            out[str(rename(name))] = given[name].to(tensor.dtype) if name in given else tensor
        return out

    written = [name for name in checkpoint.files if rename(name) is not None]
    index = write_shards(cut_into_shards(written, sizes), tensors, folder, progress)
    write_index(folder, index)
    return sum(sizes[name] for name in written)


def complete(source: Path, config: dict[str, Any], report: dict[str, Any], folder: Path) -> None:
    """Add the config, the report and what lies beside the weights to a folder of weights."""
    copy_companions(source, folder)
    for name, content in {"config.json": config, "report.json": report}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
