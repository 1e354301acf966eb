# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint in files of about a gigabyte, each of which is complete or absent."""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.folder import INDEX
from compress_common.progress import Progress, silent
from compress_common.tensor_file import save_tensors

# Of source weights. While a shard is written, it is in memory twice.
SHARD_BYTES = 1 << 30
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def serving_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype to write: float16 stays float16, everything else becomes bfloat16.

    Args:
        config: Content of config.json.
    """
    parts = config, config.get("text_config") or {}
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return _DTYPES.get(next((str(name) for name in named if name), ""), torch.bfloat16)


def cut_into_shards(names: Iterable[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """Cut tensor names into runs of about a gigabyte, at least one tensor each.

    Args:
        names: In the order of writing.
        sizes: Bytes of each.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        if size and size + sizes[name] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    return shards


def write_shards(
    shards: Sequence[list[str]],
    tensors: Callable[[list[str]], Mapping[str, torch.Tensor]],
    folder: Path,
    progress: Progress = silent,
) -> dict[str, str]:
    """Write every shard that is not there yet.

    Args:
        shards: Names of the source tensors of each file.
        tensors: Returns what is written for the names of one shard, under the same or other names.
        folder: Of a ``Partial``.
        progress: Called for each shard.

    Returns:
        ``{tensor: file}``.
    """
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        progress("write", number - 1, len(shards))
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.is_file():
            _save(tensors(names), file)
        index |= dict.fromkeys(Checkpoint.names_in(file), file.name)
    progress("write", len(shards), len(shards))
    return index


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask has it
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(contents, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)  # safetensors makes files that only we can read
    os.replace(temporary, file)


def write_index(folder: Path, index: Mapping[str, str]) -> int:
    """Write the index of the shards. Returns the bytes of all of them.

    Args:
        folder: Has the shards.
        index: ``{tensor: file}``.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return size
