# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights and of cached tokens, without and with compression.

``config`` is the text model's Hugging Face config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder, text_config
from compress_common.errors import joined
from compress_common.structure.derive import structure_of
from kv_policies.layout.base import Layout
from quant_methods.allocators.allocation import read_allocation
from quant_methods.formats.checkpoint_formats import MARKER
from quant_methods.formats.sizes import Packing, sizes_of
from quant_methods.registry import methods
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers, unknown_kinds
from vllm_plugin.settings import WeightSettings

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_FIXED_ALLOWANCE = 512 << 20  # a CUDA context, graphs, the sampler


@dataclass(frozen=True)
class Footprint:
    """Bytes without and with compression."""

    original: int
    compressed: int

    @property
    def ratio(self) -> float:
        """Compressed size as a share of the original."""
        return self.compressed / max(self.original, 1)


def weight_footprint(
    model: str | Path,
    quantization: str | None,
    settings: WeightSettings | None = None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    tensor_parallel: int | None = None,
    packing: Packing = "checkpoint",
) -> Footprint | None:
    """Compute the bytes of a model's weights on all ranks, at 16 bits and as served.

    Args:
        model: a folder or hub id.
        quantization: a weight method of this plugin, for a 16-bit checkpoint. Not needed for an
            int4 checkpoint that this plugin wrote.
        settings: ``compress.weights``.
        revision: of the hub id.
        download_dir: the hub cache.
        tensor_parallel: number of ranks; None: those that an allocation was searched for, else 1.
        packing: how the kernel stores int4.

    Returns:
        None where the bytes are not known: the model is not on this machine, or another tool
        quantized it.

    Raises:
        CompressError: the method cannot quantize this model.
    """
    folder = local_folder(str(model), revision, download_dir)
    if folder is None:
        return None
    checkpoint, config = Checkpoint(folder), text_config(folder)
    grids, embedding = {}, None
    written = checkpoint.config.get("quantization_config")
    if not (written and MARKER in written):
        if quantization in methods():
            structure_of(config)
            given = settings or WeightSettings()
            ranks = tensor_parallel or _searched_ranks(given)
            request = given.request(str(quantization), ranks)
            request.check_head(checkpoint)
            chosen = request.build().settings
            grids, embedding = chosen.grids(config), chosen.embedding_grid(config)
        elif quantization or written:
            return None
    tied = bool(config.tie_word_embeddings) and not checkpoint.own_head
    sizes = sizes_of(checkpoint, grids, tied, embedding)
    return Footprint(sizes.original, sizes.compressed(packing))


def _searched_ranks(settings: WeightSettings) -> int:
    file = (settings.model_extra or {}).get("allocation")
    return 1 if file is None else int(read_allocation(file).grid.get("tensor_parallel", 1))


def layer_token_bytes(config: Any, dtype: torch.dtype, cache_dtype: str = "auto") -> int:
    """Compute the KV bytes of one token in one layer with full attention.

    Args:
        config: the text model's.
        dtype: of the model.
        cache_dtype: ``--kv-cache-dtype``.

    Raises:
        CompressError: attention has no keys and values per head, or the dtype is unknown.
    """
    problems = []
    if others := unknown_kinds(config):
        problems.append(f"layers of kinds {', '.join(others)} are not counted")
    if getattr(config, "kv_lora_rank", None):
        problems.append("multi-head latent attention has no keys and values per head")
    if getattr(config, "num_kv_shared_layers", None):
        problems.append("layers that share another layer's cache are not counted")
    if cache_dtype != "auto" and cache_dtype not in _ITEM_BYTES:
        problems.append(f"--kv-cache-dtype {cache_dtype} is not one of {', '.join(_ITEM_BYTES)}")
    if problems:
        raise joined(problems)
    shape = fingerprint_of(str(config.model_type), config)
    itemsize = dtype.itemsize if cache_dtype == "auto" else _ITEM_BYTES[cache_dtype]
    return 2 * shape.num_key_value_heads * shape.head_dim * itemsize


def kv_footprint(
    config: Any,
    dtype: torch.dtype,
    cache_dtype: str,
    layouts: Mapping[int, Layout] | None,
    prompt: int = 1,
) -> Footprint:
    """Compute the KV bytes that each token of a long prompt costs, without and with compression.

    Layers with a sliding window are not counted: their cache does not grow with the prompt.

    Args:
        config: the text model's.
        dtype: of the model.
        cache_dtype: ``--kv-cache-dtype``.
        layouts: by layer; None: nothing is compressed.
        prompt: its tokens, which matter where a budget is kept, whatever its length.
    """
    layers = full_attention_layers(config)
    each = layer_token_bytes(config, dtype, cache_dtype)
    shares = (layouts[i].share_of(prompt) if layouts else Fraction(1) for i in layers)
    kept = sum(shares, Fraction(0))
    return Footprint(len(layers) * each, ceil(each * kept))


def activation_allowance(config: Any, batch: int = 8192, requests: int = 256) -> int:
    """Estimate the bytes that are neither weights nor KV; vLLM measures them when it starts.

    The estimate is the widest activations of a decoder block at 16 bits, the logits with their
    copies in the sampler, and half a GiB.

    Args:
        config: the text model's.
        batch: most tokens of one step.
        requests: most requests at once.
    """
    width = 3 * int(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    width += 4 * config.hidden_size
    return 2 * width * batch + 10 * config.vocab_size * requests + _FIXED_ALLOWANCE
