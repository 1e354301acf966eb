# SPDX-License-Identifier: Apache-2.0
"""Models in transformers, for the tools that measure one before it is served."""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from compress_common.errors import CompressError, joined
from quant_methods.calibration import SELF, CalibrationSettings
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, not_reached
from vllm_plugin.kv_fingerprint import full_attention_layers


def layers_to_fit(name: str, config: Any) -> tuple[int, ...]:
    """The full-attention layers; CompressError lists what makes a model unfit for KV policies."""
    decoder = config.get_text_config()
    problems = []
    if config.is_encoder_decoder:
        problems.append("is an encoder-decoder; decoders only")
    if rank := getattr(decoder, "kv_lora_rank", None):
        problems.append(f"uses multi-head latent attention (kv_lora_rank {rank}): no keys per head")
    if shared := getattr(decoder, "num_kv_shared_layers", None):
        problems.append(f"has {shared} layers that share the KV cache of another")
    layers = () if problems else full_attention_layers(decoder)
    if not problems and not layers:
        window = getattr(decoder, "sliding_window", None)
        problems.append(f"has no layer with full attention (sliding window {window})")
    if problems:
        kind = decoder.model_type
        raise joined([f"{name} ({kind}) cannot be measured: it {p}" for p in problems])
    return layers


def loaded(loader: Any, folder: Path, name: str, **options: Any) -> Any:
    """``loader.from_pretrained`` without remote code; CompressError when it cannot."""
    try:
        return loader.from_pretrained(folder, trust_remote_code=False, **options)
    except (ValueError, OSError, KeyError, ImportError, StrictDataclassError) as error:
        if error.args == (ATTENTION,):  # looked up in a model's own table of attention classes
            raise not_reached(AutoConfig.from_pretrained(folder)) from error
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise CompressError(f"transformers cannot load {name}: {reason}") from error


def usable(device: str) -> torch.device:
    """The device of this name; CompressError when this machine cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        raise CompressError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def origin(text: CalibrationSettings) -> dict[str, Any]:
    """Where figures measured now, on this text, come from: for the file that holds them."""
    own = text.source == SELF
    return {
        "tool_version": version("vllm-compress-plugin"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": f"sampled by the model itself, seed {text.seed}" if own else Path(text.source).name,
        "text_sha256": None if own else hashlib.sha256(Path(text.source).read_bytes()).hexdigest(),
        "sample_tokens": text.length,
    }
