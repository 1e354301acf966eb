# SPDX-License-Identifier: Apache-2.0
"""Cut an embedding model to its first blocks and the first numbers of its vectors.

For models that were trained for it. Paper: Starbucks: Improved Training for 2D Matryoshka
Embeddings, https://arxiv.org/abs/2410.13230
"""

import functools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.companions import module_folders
from compress_common.checkpoints.partial import Partial
from compress_common.errors import joined
from compress_common.progress import Progress, silent
from compress_common.space import Need, check_space
from depth_pruning.cutting import MARKER, block_prefix, cut_config, renamed
from depth_pruning.writing import complete, write_tensors

_DIMENSIONS = "matryoshka_dimensions"  # what vLLM reads


class CutRequest(BaseModel):
    """How much of an embedding model stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_first: int = Field(ge=1, description="blocks that stay")
    dimensions: int | None = Field(None, ge=1, description="numbers of a vector that can be asked")


def cut_embedding_model(
    source: Path, target: Path, request: CutRequest, *, progress: Progress = silent
) -> dict[str, Any]:
    """Write a checkpoint of the first blocks. Nothing is searched, healed or measured.

    Args:
        source: Folder of a 16-bit checkpoint.
        target: Folder that must not exist yet.
        request: What stays.
        progress: Called for each shard.

    Returns:
        The report, which is written to ``report.json`` too.

    Raises:
        CompressError: Bad input, or a folder that cannot be written.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.hf_config
    depth, hidden = int(getattr(config, "num_hidden_layers", 0)), getattr(config, "hidden_size", 0)
    problems = []
    if hasattr(config, "wrapper"):
        problems.append("it is a model of images and text; give a language model")
    if getattr(config, "is_encoder_decoder", False):
        problems.append("it has an encoder and a decoder; give a model that has only one of them")
    if getattr(config, "quantization_config", None):
        problems.append("it is quantized already; give the original 16-bit checkpoint")
    if not 1 <= request.keep_first <= depth:
        problems.append(f"--keep-first {request.keep_first}: it has {depth} blocks")
    if request.dimensions is not None and request.dimensions > hidden:
        problems.append(f"--dimensions {request.dimensions}: its vectors have {hidden} numbers")
    if problems:
        raise joined([f"{source} cannot be cut: {problem}" for problem in problems])
    module_folders(source)
    output = Partial(target)
    kept = range(request.keep_first)
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    written = cut_config(checkpoint.config, config.to_dict(), kept, depth, key)
    if request.dimensions is not None:
        written[_DIMENSIONS] = [request.dimensions]
    if request.keep_first < depth:
        written[MARKER] = {
            "schema": 1,
            "source": checkpoint.weights_digest,
            "source_layers": depth,
            "dropped": list(range(request.keep_first, depth)),
            "heal": "none",
        }
    prefix = block_prefix(checkpoint.files, depth)
    rename = functools.partial(renamed, prefix=prefix, kept=kept, depth=depth)
    need = sum(size for name, (_, size) in checkpoint.shapes().items() if rename(name))
    need -= output.written
    check_space([Need(output.folder.parent, need, "the checkpoint", "--out")])
    with output.writing():
        output.start_or_resume({"source": checkpoint.weights_digest} | request.model_dump())
        size = write_tensors(checkpoint, rename, output.folder, progress=progress)
        report = {
            "method": "prune",
            "keep_first": request.keep_first,
            "dimensions": request.dimensions,
            "layers_before": depth,
            "layers_after": request.keep_first,
            "weight_bytes_before": checkpoint.weight_bytes,
            "weight_bytes_after": size,
        }
        complete(source, written, report, output.folder)
    return report
