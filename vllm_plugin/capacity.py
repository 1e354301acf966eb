# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes and how many requests fit, computed from configs and headers.

Blocks are counted as vLLM counts them. Layers of one kind (the same keep level or sliding window)
form groups. Each group has its own block table, and all groups draw blocks from one pool. A block
is one page of each layer of a group. ``config`` is the text model's Hugging Face config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder, text_config
from compress_common.errors import CompressError, joined
from compress_common.structure.derive import structure_of
from kv_policies.layout.base import Layout
from quant_methods.formats.checkpoint_formats import MARKER
from quant_methods.formats.sizes import Packing, sizes_of
from quant_methods.registry import methods
from vllm_plugin.kv_fingerprint import (
    fingerprint_of,
    full_attention_layers,
    state_layers,
    unknown_kinds,
)
from vllm_plugin.page_sizes import block_sizes
from vllm_plugin.settings import WeightSettings

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_STATES = 2  # blocks of a request in a group of states: where a step begins, and where it ends
_WINDOWED = ("sliding_attention", "chunked_attention")
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


@dataclass(frozen=True)
class Group:
    """Layers that share a block table.

    Attributes:
        members: their indices in the model.
        layout: how they are compressed; None: they are not.
        window: their sliding window in tokens; None: full attention.
        state: they keep a state that fills a block, whatever a request's length.
        scale: tokens of their blocks, as a multiple of the block size: see ``page_sizes``.
    """

    members: tuple[int, ...]
    layout: Layout | None = None
    window: int | None = None
    state: bool = False
    scale: int = 1

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.members)


@dataclass(frozen=True)
class RequestBlocks:
    """Blocks of one request over all groups.

    Attributes:
        peak: the most at any time, which is usually while the prompt is computed.
        decoding: the most while it decodes.
    """

    peak: int
    decoding: int

    def all_decoding(self, blocks: int) -> int:
        """How many requests fit a pool of ``blocks`` once their prompts are computed."""
        return max(0, blocks - 1) // self.decoding  # vLLM keeps one block back

    def one_in_prefill(self, blocks: int) -> int:
        """How many requests fit a pool of ``blocks`` while one of them is at its peak."""
        room = blocks - 1 - self.peak
        return 0 if room < 0 else 1 + room // self.decoding


def weight_footprint(
    model: str | Path,
    quantization: str | None,
    settings: WeightSettings | None = None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    tensor_parallel: int = 1,
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
        tensor_parallel: number of ranks.
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
            request = (settings or WeightSettings()).request(str(quantization), tensor_parallel)
            request.check_head(checkpoint)
            chosen = request.build().settings
            grids, embedding = chosen.grids(config), chosen.embedding_grid(config)
        elif quantization or written:
            return None
    tied = bool(config.tie_word_embeddings) and not checkpoint.own_head
    sizes = sizes_of(checkpoint, grids, tied, embedding)
    return Footprint(sizes.original, sizes.compressed(packing))


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


def groups_of(config: Any, layouts: Mapping[int, Layout] | None, ranks: int = 1) -> list[Group]:
    """Return the KV-cache groups that vLLM makes of a model whose pages have one size.

    As vLLM's ``get_kv_cache_groups``: each kind of layer is cut into groups of the smallest kind's
    size. Where kinds are nearly equal, the smaller ones are padded to the largest instead.

    Args:
        config: the text model's.
        layouts: by layer; None: nothing is compressed.
        ranks: of tensor parallelism, which share the KV heads of each layer.
    """
    full, states = set(full_attention_layers(config)), set(state_layers(config))
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", 0)
    named = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    kinds: dict[tuple[Layout | None, int | None, bool], list[int]] = {}
    for layer in range(config.num_hidden_layers):
        if layer in full:
            kinds.setdefault(((layouts or {}).get(layer), None, False), []).append(layer)
        elif window and named[layer] in _WINDOWED:
            kinds.setdefault((None, window, False), []).append(layer)
        if layer in states:
            kinds.setdefault((None, None, True), []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    smallest, largest = min(counts), max(counts)
    size = largest if largest < smallest * 1.5 else smallest
    scales = block_sizes(config, 1, ranks)
    return [
        Group(tuple(layers[part::parts]), *kind, scale=scales[layers[0] not in full])
        for kind, layers in kinds.items()
        for parts in [-(-len(layers) // size)]
        for part in range(parts)
    ]


def block_bytes(
    groups: Sequence[Group],
    block_size: int,
    token_bytes: int,
    stages: Sequence[range] | None = None,
) -> int:
    """Return the bytes of one block of the pool.

    Args:
        groups: of ``groups_of``.
        block_size: tokens per block, of the layers whose tokens take most.
        token_bytes: of ``layer_token_bytes``.
        stages: the layers of each pipeline stage; None: one stage has all. All stages have as many
            blocks as the one where a block is largest, and that is where this is counted.
    """
    layers = [group.members for group in groups]
    if stages is not None:
        layers = [tuple(x for x in members if x in stage) for members in layers for stage in stages]
    most = max(map(len, layers))
    scales = [group.scale for group in groups if group.window is None and not group.state]
    return most * block_size * next(iter(scales), 1) * token_bytes


def request_blocks(
    groups: Sequence[Group], block_size: int, context: int, prompt: int, in_flight: int = 8192
) -> RequestBlocks:
    """Count the blocks of a request.

    Args:
        groups: of ``groups_of``.
        block_size: tokens per block, of the layers whose tokens take most.
        context: tokens of the request when it ends.
        prompt: how many of them are prompt. While it is computed, all of it is stored, unless it is
            longer than the prompt window of a layout.
        in_flight: tokens of steps that have not settled, at most.

    Raises:
        CompressError: the prompt leaves no room for an answer.
    """
    if not 0 < prompt < context:
        raise CompressError(
            f"a prompt of {prompt} tokens does not fit in a context of {context} with an answer"
        )
    prefill = decoding = 0
    for group in groups:
        size = block_size * group.scale
        if group.state:
            first = later = _STATES
        elif group.window:  # plus one, because a window can start inside a block
            first, later = (
                min(-(-tokens // size), -(-(group.window - 1 + step) // size) + 1)
                for tokens, step in ((prompt, in_flight), (context, 1))
            )
        else:
            layout = group.layout
            first = layout.most_columns(prompt, in_flight) if layout else -(-prompt // size)
            later = _most_blocks(layout, size, prompt, context)
        prefill, decoding = prefill + first, decoding + later
    return RequestBlocks(max(prefill, decoding), decoding)


def typical_prompt(context: int) -> int:
    """Return the default prompt of a request of ``context`` tokens: seven eighths of it."""
    return context - context // 8


def requests_in_pool(
    config: Any,
    layouts: Mapping[int, Layout],
    block_size: int,
    blocks: int,
    context: int,
    stages: Sequence[range] | None = None,
    ranks: int = 1,
) -> tuple[int, int]:
    """Count the requests of ``context`` tokens that can decode at once in a pool.

    Args:
        config: the text model's.
        layouts: of the compressed layers.
        block_size: tokens per block.
        blocks: of the pool, with compression.
        context: tokens of a request when it ends.
        stages: the layers of each pipeline stage; None: one stage has all.
        ranks: of tensor parallelism.

    Returns:
        Requests without compression, in the same memory, and with compression.
    """
    groups, stock = (groups_of(config, chosen, ranks) for chosen in (layouts, None))
    ours, theirs = (block_bytes(kinds, block_size, 1, stages) for kinds in (groups, stock))
    same = blocks * ours // theirs
    before, after = (
        request_blocks(kinds, block_size, context, typical_prompt(context)).all_decoding(pool)
        for kinds, pool in ((stock, same), (groups, blocks))
    )
    return before, after


def _most_blocks(layout: Layout | None, block_size: int, prompt: int, context: int) -> int:
    """Return the most blocks in one table while a request decodes."""
    if layout is None:
        return -(-context // block_size)
    # A table is largest at the end, or just before a window is compacted.
    n = layout.head(prompt)
    ends = [segment.ends for segment in layout.segments(n, context - 1, after=prompt)]
    return max(
        -(-tokens // block_size) - sum(b - a for a, b in layout.freed(n, tokens - 1))
        for tokens in [*ends, context]
    )


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
