# SPDX-License-Identifier: Apache-2.0
"""The calibration text of a checkpoint: from a file, or sampled once and stored."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress_common.calibration.text import (
    SELF,
    CalibrationSettings,
    file_tokens,
    sampled_tokens,
    start_token,
)
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.identity import tensor_digest
from compress_common.progress import Progress
from compress_common.store import Store, digest
from compress_common.tensor_file import save_tensors

KIND = "calibration-text"
_TOKENS = "tokens.safetensors"


def computed(dtype: torch.dtype | None) -> dict[str, str]:
    """Return the part of a key that names the type of calibration; the model's own adds none."""
    return {} if dtype is None else {"computed": str(dtype)}


def text_identity(checkpoint: Checkpoint, settings: CalibrationSettings) -> dict[str, Any]:
    """Return what the calibration tokens depend on besides the weights."""
    if settings.source != SELF:
        return {"tokens": tensor_digest(file_tokens(settings, checkpoint.tokenizer))}
    return settings.model_dump() | {"start": start_token(checkpoint.tokenizer)}


def known_tokens(
    checkpoint: Checkpoint, settings: CalibrationSettings, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """Return calibration tokens that need no model: from a file, or sampled by an earlier run.

    Args:
        checkpoint: The model that the text is for.
        settings: Where the text comes from.
        dtype: Of the model that samples; None: its own.

    Returns:
        int64 [samples, length]; None: the model has to sample them.

    Raises:
        CompressError: The text cannot be read, or is too short.
    """
    if settings.source != SELF:
        return file_tokens(settings, checkpoint.tokenizer)
    folder = Store().find(KIND, _text_key(checkpoint, settings, dtype))
    return None if folder is None else load_file(folder / _TOKENS)["tokens"]


def _text_key(
    checkpoint: Checkpoint, settings: CalibrationSettings, dtype: torch.dtype | None
) -> str:
    identity = text_identity(checkpoint, settings) | computed(dtype)
    return digest(checkpoint.digest, json.dumps(identity, sort_keys=True))


def stored_tokens(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    model: Any,
    progress: Progress,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return calibration tokens, int64 [samples, length]. Sampled text is stored: it is slow.

    Args:
        checkpoint: The model that the text is for.
        settings: Where the text comes from.
        model: The ``transformers`` model of the checkpoint, which samples the text.
        progress: Told of each step of sampling.
        dtype: Of the model; None: its own.

    Raises:
        CompressError: The text cannot be read, or is too short.
    """
    if (known := known_tokens(checkpoint, settings, dtype)) is not None:
        return known

    def build(folder: Path) -> None:
        start = start_token(checkpoint.tokenizer)
        tokens = sampled_tokens(settings, model, start, progress)
        save_tensors({"tokens": tokens}, folder / _TOKENS)

    store = Store()
    with store.writing("the sampled text"):
        folder = store.make(KIND, _text_key(checkpoint, settings, dtype), build)
    return load_file(folder / _TOKENS)["tokens"]
