# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes, and how many requests fit: arithmetic on configs and headers.

Blocks are counted as vLLM counts them. Layers of one kind (one keep level, one sliding window) form
groups; each group has a block table of its own, and all draw blocks from one pool, in which a block
is one page of each layer of a group. ``config`` is the text model's Hugging Face config.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compress_common.errors import CompressError, joined
from kv_policies.layout.base import Layout
from quant_methods.architecture import architecture_of
from quant_methods.checkpoint import Checkpoint
from quant_methods.formats import MARKER
from quant_methods.local import local_folder, text_config
from quant_methods.registry import methods
from quant_methods.sizes import Packing, sizes_of
from vllm_plugin.compatibility import weight_model_problems
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
        """Share that is left."""
        return self.compressed / max(self.original, 1)


@dataclass(frozen=True)
class Group:
    """Layers with one block table: compressed (``layout``), of a sliding ``window`` (tokens), or
    neither."""

    layers: int
    layout: Layout | None = None
    window: int | None = None


@dataclass(frozen=True)
class RequestBlocks:
    """Blocks of one request over all groups: at its ``peak``, and the most while it decodes."""

    peak: int
    decoding: int

    def all_decoding(self, blocks: int) -> int:
        """Requests that fit a pool of ``blocks`` once their prompts are computed."""
        return max(0, blocks - 1) // self.decoding  # vLLM keeps one block back

    def one_in_prefill(self, blocks: int) -> int:
        """Requests that fit if one of them is at its peak."""
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
    """Bytes of a model's weights, of all ranks: at 16 bits, and as served.

    quantization: a method of ours, for a 16-bit checkpoint; not needed for one that we wrote.
    packing: how the kernel holds int4. None when the model is not on this machine, or its bytes are
    not for us to know: quantised by others. CompressError when it cannot be quantised.
    """
    folder = local_folder(str(model), revision, download_dir)
    if folder is None:
        return None
    checkpoint, config = Checkpoint(folder), text_config(folder)
    grids = {}
    written = checkpoint.config.get("quantization_config")
    if not (written and MARKER in written):
        if quantization in methods():
            if problems := weight_model_problems(checkpoint.config):
                raise joined(problems)
            architecture_of(config)
            request = (settings or WeightSettings()).request(str(quantization), tensor_parallel)
            grids = request.build().settings.grids(config)
        elif quantization or written:
            return None
    sizes = sizes_of(checkpoint, grids, tied=bool(config.tie_word_embeddings))
    return Footprint(sizes.original, sizes.compressed(packing))


def layer_token_bytes(config: Any, dtype: torch.dtype, cache_dtype: str = "auto") -> int:
    """KV bytes of one token in one layer. cache_dtype: as ``--kv-cache-dtype`` has it.

    CompressError for other attention than with keys and values per head, or an unknown dtype.
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
    config: Any, dtype: torch.dtype, cache_dtype: str, layouts: Mapping[int, Layout] | None
) -> Footprint:
    """KV bytes that one more token of a long prompt costs, before and after it is compacted.

    layouts: by layer, None: nothing is compressed. Sliding windows cost nothing more.
    """
    layers = full_attention_layers(config)
    each = layer_token_bytes(config, dtype, cache_dtype)
    kept = sum((layouts[i].share if layouts else Fraction(1) for i in layers), Fraction(0))
    return Footprint(len(layers) * each, ceil(each * kept))


def groups_of(config: Any, layouts: Mapping[int, Layout] | None) -> list[Group]:
    """vLLM's KV-cache groups of a model whose layers have pages of one size.

    As its ``get_kv_cache_groups``: kinds of layers are cut to the size of the smallest, or padded
    to that of the largest where they are nearly equal.
    """
    full = set(full_attention_layers(config))
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", 0)
    kinds = Counter(
        Group(0, (layouts or {}).get(layer)) if layer in full else Group(0, None, window)
        for layer in range(config.num_hidden_layers)
    )
    smallest, largest = min(kinds.values()), max(kinds.values())
    size = largest if largest < smallest * 1.5 else smallest
    return [
        Group(len(range(part, count, parts)), kind.layout, kind.window)
        for kind, count in kinds.items()
        for parts in [-(-count // size)]
        for part in range(parts)
    ]


def block_bytes(groups: Sequence[Group], block_size: int, token_bytes: int) -> int:
    """Bytes of one block of the pool. token_bytes: of ``layer_token_bytes``."""
    return max(group.layers for group in groups) * block_size * token_bytes


def request_blocks(
    groups: Sequence[Group], block_size: int, context: int, prompt: int, batch: int = 8192
) -> RequestBlocks:
    """Blocks of a request of ``prompt`` tokens that grows to ``context`` tokens.

    While its prompt is computed, in parts of up to ``batch`` tokens, it holds all of it.
    """
    if not 0 < prompt < context:
        raise CompressError(
            f"a prompt of {prompt} tokens does not fit in a context of {context} with an answer"
        )
    prefill = decoding = 0
    for group in groups:
        if group.window:  # one more, as a window may start inside a block
            first, later = (
                min(-(-tokens // block_size), -(-(group.window - 1 + step) // block_size) + 1)
                for tokens, step in ((prompt, batch), (context, 1))
            )
        else:
            first, later = (
                -(-prompt // block_size),
                _held(group.layout, block_size, prompt, context),
            )
        prefill, decoding = prefill + first, decoding + later
    return RequestBlocks(max(prefill, decoding), decoding)


def typical_prompt(context: int) -> int:
    """The prompt of a request of ``context`` tokens that nobody described: seven eighths."""
    return context - context // 8


def requests_in_pool(
    config: Any, layouts: Mapping[int, Layout], block_size: int, blocks: int, context: int
) -> tuple[int, int]:
    """Requests of ``context`` tokens that decode at once in a pool of ``blocks``, compressed as
    ``layouts`` say: without compression, in the same memory, and with it."""
    groups, stock = groups_of(config, layouts), groups_of(config, None)
    same = blocks * block_bytes(groups, block_size, 1) // block_bytes(stock, block_size, 1)
    before, after = (
        request_blocks(kinds, block_size, context, typical_prompt(context)).all_decoding(pool)
        for kinds, pool in ((stock, same), (groups, blocks))
    )
    return before, after


def _held(layout: Layout | None, block_size: int, prompt: int, context: int) -> int:
    """The most blocks in one table while a request decodes."""
    if layout is None:
        return -(-context // block_size)
    # Largest at the end, and each time just before a window is compacted.
    ends = [segment.ends for segment in layout.segments(prompt, context - 1, after=prompt)]
    return max(
        -(-tokens // block_size) - sum(b - a for a, b in layout.freed(prompt, tokens - 1))
        for tokens in [*ends, context]
    )


def activation_allowance(config: Any, batch: int = 8192, requests: int = 256) -> int:
    """Bytes set aside for what is neither weights nor KV; vLLM measures them when it starts.

    batch: tokens per step. requests: most at once. The widest activations of a decoder block at 16
    bits, logits with their copies in the sampler, and half a GiB.
    """
    width = 3 * int(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    width += 4 * config.hidden_size
    return 2 * width * batch + 10 * config.vocab_size * requests + _FIXED_ALLOWANCE
