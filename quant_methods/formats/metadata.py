# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint has besides weights: config, index, report, and what is copied."""

import json
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.companions import copy_companions
from compress_common.checkpoints.shards import write_index
from compress_common.structure.derive import structure_of
from compress_common.structure.structure import HEAD
from quant_methods.formats.checkpoint_formats import NEEDS_PLUGIN, Format
from quant_methods.formats.plan import Plan
from quant_methods.formats.sizes import bits_per_weight


def write_metadata(
    checkpoint: Checkpoint,
    plan: Plan,
    chosen: Format,
    written: dict[str, Any],
    dtype: torch.dtype,
    index: dict[str, str],
    folder: Path,
) -> dict[str, Any]:
    """Complete a folder of weights to a checkpoint. Returns its report.

    Args:
        checkpoint: What was quantized.
        plan: How.
        chosen: The format of the weights.
        written: Its ``quantization_config``.
        dtype: Of the tensors that stay at 16 bits.
        index: ``{tensor: file}``.
        folder: Has the weights.
    """
    copy_companions(checkpoint.folder, folder)
    size = write_index(folder, index)
    report = {
        "method": plan.method,
        "format": chosen.name,
        "needs_plugin": written["quant_method"] == NEEDS_PLUGIN,
        "weight_bytes_before": checkpoint.weight_bytes,
        "weight_bytes_after": size,
        "bits_per_weight": round(bits_per_weight(plan.grids, checkpoint.hf_config), 4),
        **plan.report,
    }
    if plan.embedding is not None:
        bits = plan.embedding.stored_bits(checkpoint.hf_config.hidden_size)
        report["embedding_bits_per_weight"] = round(bits, 4)
    config = checkpoint.config | {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": written,
        **plan.config,
    }
    if f"{checkpoint.names.outer(HEAD)}.weight_packed" in index:
        # vLLM looks for an lm_head.weight to see that they are not tied, and there is none now.
        config["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    for name, content in {"config.json": config, "report.json": report}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


def marker_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What the config notes about the checkpoint."""
    known = structure_of(checkpoint.hf_config).attention
    stored = ("",) if known is None else (f"{known.key}.output", f"{known.value}.output")
    return {
        "schema": 1,
        "method": plan.method,
        "alpha": plan.report.get("alpha"),
        "source": checkpoint.weights_digest,
        # Whether keys or values in the KV cache differ from the original model's.
        "values_scaled": known is not None
        and any(side.endswith(stored) for side in (*plan.vectors, *plan.rotations)),
        # Whether linears get and give what they did: then adapters of the original model fit.
        "inputs_kept": not (plan.vectors or plan.rotations),
        # Whether only the head undoes what was done to the last hidden states.
        "last_states_rotated": f"{HEAD}.input" in plan.rotations,
    }
