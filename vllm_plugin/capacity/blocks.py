# SPDX-License-Identifier: Apache-2.0
"""Blocks of requests, counted as vLLM counts them.

Layers of one kind (the same keep level or sliding window) form groups. Each group has its own block
table, and all groups draw blocks from one pool. A block is one page of each layer of a group.
``config`` is the text model's Hugging Face config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_common.errors import CompressError
from kv_policies.layout.base import Layout
from vllm_plugin.kv_fingerprint import full_attention_layers, state_layers
from vllm_plugin.page_sizes import block_sizes

_STATES = 2  # blocks of a request in a group of states: where a step begins, and where it ends
_WINDOWED = ("sliding_attention", "chunked_attention")


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
    """Return the default prompt of a request of ``context`` tokens: seven eighths of it.

    It leaves room for an answer where there are two tokens or more.
    """
    return max(1, context - max(1, context // 8))


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
