# SPDX-License-Identifier: Apache-2.0
"""How many requests fit a device, without and with compression, from a config and headers."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder, text_config
from compress_common.errors import CompressError, joined, nearest
from kv_policies import memory as kv_memory
from kv_policies.base import KVPolicy
from kv_policies.layout.base import Layout
from kv_policies.memory import Beside
from kv_policies.workspace import Heads
from quant_methods.formats.checkpoint_formats import MARKER
from quant_methods.formats.sizes import Packing
from quant_methods.registry import methods
from vllm_plugin.capacity.blocks import Group, block_bytes, groups_of, request_blocks
from vllm_plugin.capacity.footprint import (
    Footprint,
    activation_allowance,
    kv_footprint,
    layer_token_bytes,
    weight_footprint,
)
from vllm_plugin.commands.common import Problems
from vllm_plugin.compatibility import (
    drop_wide_window,
    kv_model_problems,
    model_length,
    refuse_diffusion,
)
from vllm_plugin.depth import described
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.kv_fingerprint import fingerprint_of, state_layers, unknown_kinds
from vllm_plugin.page_sizes import full_block_size
from vllm_plugin.settings import Settings, no_method_problem, parse_settings

_CUDA_BLOCK = 16  # vLLM's default
_CUDA_STEPS = 2  # in flight: vLLM schedules one while another runs, by default on CUDA only


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment, in tokens.

    Attributes:
        context: tokens of a request when it ends.
        prompt: how many of them are prompt.
        block_size: tokens per block of the KV cache.
        batch: tokens per step, at most.
        sequences: requests that run at a time, at most.
    """

    context: int
    prompt: int
    block_size: int
    batch: int
    sequences: int = 256


@dataclass(frozen=True)
class Column:
    """What one deployment takes, in bytes and blocks, and how many requests it serves at once.

    Attributes:
        beside_cache: kept free for choosing tokens.
        stored_queries: of it, queries of the running requests that score their decode windows.
    """

    weights: int
    beside_cache: int
    stored_queries: int
    kv_bytes_per_token: int
    kv_memory: int
    block_bytes: int
    blocks: int
    peak_blocks: int
    decoding_blocks: int
    requests: int
    requests_one_in_prefill: int

    @property
    def peak_bytes(self) -> int:
        """KV memory of a request at its peak."""
        return self.peak_blocks * self.block_bytes

    @property
    def decoding_bytes(self) -> int:
        """KV memory of a request while it decodes, at most."""
        return self.decoding_blocks * self.block_bytes


@dataclass(frozen=True)
class Comparison:
    """A deployment without and with compression.

    Attributes:
        activation_memory: bytes set aside for activations and graphs.
        model_length: tokens that the model has positions for; None: its config does not say.
        block_size: tokens per block, larger than asked for where a block must hold a state.
        prompt_window: tokens from which on prompts are compacted while they are computed; None:
            the prompt is computed whole.
        depth: which blocks `prune` dropped; None: none.
    """

    without: Column
    compressed: Column
    activation_memory: int
    model_length: int | None
    block_size: int
    prompt_window: int | None = None
    depth: str | None = None


def compare(
    model: str,
    load: Load,
    memory: int,
    *,
    quantization: str | None,
    additional_config: Mapping[str, Any],
    packing: Packing,
    activation_memory: int | None,
    problems: Problems,
) -> Comparison:
    """Compare a deployment without and with compression.

    Args:
        model: a folder, or a hub id whose files are on this machine.
        load: the requests.
        memory: bytes that vLLM may use.
        quantization: a weight method of this plugin, or None.
        additional_config: as for ``vllm serve``.
        packing: how kernels hold int4 weights.
        activation_memory: bytes to set aside for activations; None: an estimate.
        problems: what was found so far; what is found here is added.

    Raises:
        CompressError: lists all of ``problems``, if there are any.
    """
    settings = problems.collect(lambda: parse_settings(additional_config))
    folder = problems.collect(lambda: _folder(model))
    config = problems.collect(lambda: text_config(folder)) if folder else None
    weights = layouts = each = None
    if folder is not None and config is not None and settings is not None:
        if settings.diffusion is not None:
            problems.collect(lambda: refuse_diffusion(Checkpoint(folder).config.get("model_type")))
        weights = problems.collect(lambda: _weights(folder, quantization, settings, packing))
        if settings.kv is not None:
            drop_wide_window(config, load.context)  # as the config edge does
        if state_layers(config) and not unknown_kinds(config):
            from vllm_plugin.kv_cache.hybrid import served_block_size  # imports vLLM

            size = problems.collect(lambda: served_block_size(str(folder), load.block_size))
            load = replace(load, block_size=size or load.block_size)
        layouts = problems.collect(lambda: _layouts(settings, load.block_size, model, config))
        if not problems.found:  # it would say of the same model that its cache is not counted
            each = problems.collect(lambda: layer_token_bytes(config, torch.bfloat16))
    if problems.found or weights is None or each is None:
        raise joined(problems.found)

    aside = activation_memory
    if aside is None:
        aside = activation_allowance(config, load.batch)
    kv = kv_footprint(config, torch.bfloat16, "auto", layouts, load.prompt)
    beside = _beside(settings, layouts or {}, config, load, packing) if settings else Beside()
    in_flight = load.batch * (1 if packing.startswith("cpu") else _CUDA_STEPS)
    room = memory - aside
    without, compressed = (
        _column(groups_of(config, chosen), load, in_flight, room, taken, more, per_token, each)
        for chosen, taken, more, per_token in (
            (None, weights.original, Beside(), kv.original),
            (layouts, weights.compressed, beside, kv.compressed),
        )
    )
    heads = [layout.head(load.prompt) for layout in (layouts or {}).values()]
    cut = next((head for head in heads if head < load.prompt), None)
    length, depth = model_length(config), described(config)
    return Comparison(without, compressed, aside, length, load.block_size, cut, depth)


def _column(
    groups: list[Group],
    load: Load,
    in_flight: int,
    room: int,
    weights: int,
    beside: Beside,
    per_token: int,
    each: int,
) -> Column:
    """room: bytes for weights and KV. each: KV bytes of one token in one layer."""
    page = block_bytes(groups, load.block_size, each)
    need = request_blocks(groups, load.block_size, load.context, load.prompt, in_flight)
    left = max(0, room - weights - beside.total)
    blocks = left // page
    return Column(
        weights=weights,
        beside_cache=beside.total,
        stored_queries=beside.queries,
        kv_bytes_per_token=per_token,
        kv_memory=left,
        block_bytes=page,
        blocks=blocks,
        peak_blocks=need.peak,
        decoding_blocks=need.decoding,
        requests=need.all_decoding(blocks),
        requests_one_in_prefill=need.one_in_prefill(blocks),
    )


def _beside(
    settings: Settings, layouts: Mapping[int, Layout], config: Any, load: Load, packing: Packing
) -> Beside:
    """What one rank that has all heads keeps free beside the cache; latents are not counted."""
    policy = settings.kv and settings.kv.build()
    if not isinstance(policy, KVPolicy):
        return Beside()
    shape, dtype = fingerprint_of(str(config.model_type), config), torch.bfloat16
    kv = shape.num_key_value_heads
    device = "cpu" if packing.startswith("cpu") else "cuda"
    heads = Heads(kv, shape.num_attention_heads // kv, shape.head_dim, dtype.itemsize, device)
    work = kv_memory.Load(load.context, 1, load.sequences)
    return kv_memory.beside_cache(policy, list(layouts.values()), heads, work, dtype)


def _folder(model: str) -> Path:
    folder = local_folder(model)
    if folder is None and model.startswith(("/", "./", "../", "~")):
        raise CompressError(f"the model folder {model!r} does not exist; give a folder or a hub id")
    if folder is None:
        raise CompressError(
            f"{model} is not on this machine, and `plan` downloads nothing; give a folder, or "
            f"fetch it first: hf download {model}"
        )
    Checkpoint(folder)  # raises when its files are wrong
    return folder


def _weights(
    folder: Path, quantization: str | None, settings: Settings, packing: Packing
) -> Footprint:
    if quantization is not None and quantization not in methods():
        hint = nearest(quantization, methods())
        raise CompressError(
            f"--quantization {quantization!r} is not a method of this plugin{hint} "
            f"(valid: {', '.join(sorted(methods()))})"
        )
    written = Checkpoint(folder).config.get("quantization_config") or {}
    if settings.weights is not None and MARKER in written:
        if fixed := settings.weights.fixed_problems():
            raise joined(fixed)
    elif settings.weights is not None and quantization is None:
        raise no_method_problem(written.get("quant_method"))
    found = weight_footprint(folder, quantization, settings.weights, packing=packing)
    if found is None:
        raise CompressError(
            f"{folder} was quantized by another tool, so its 16-bit size is unknown; give the "
            "original checkpoint"
        )
    return found


def default_block_size(additional_config: dict[str, Any]) -> int:
    """Return the tokens per block that an engine on CUDA takes."""
    with suppress(CompressError):  # ``compare`` lists what is wrong
        kv = parse_settings(additional_config).kv
        return (kv and kv.gpu_block_size) or _CUDA_BLOCK
    return _CUDA_BLOCK


def _layouts(
    settings: Settings, block_size: int, model: str, config: Any
) -> Mapping[int, Layout] | None:
    if settings.kv is None:
        return None
    settings.kv.build()
    if problems := kv_model_problems(config, settings.kv.capabilities):
        raise joined(problems)
    return layouts_of(settings.kv, full_block_size(config, block_size), model, config)
