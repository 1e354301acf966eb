# SPDX-License-Identifier: Apache-2.0
"""The worker's side, over any attention backend: what the kernel reads, and when to compact.

``CompressedBuilder`` and ``CompressedImpl`` are mixed in front of a backend's own builder and
implementation, which do everything else. ``CustomBackend`` is mixed in front of its backend class.

A CUDA graph of a decode step holds each layer's forward and nothing of the builder, which runs
before each replay. So what kernels read is always in the same memory, and what forward does besides
is not part of a decode step: prompts are compacted there where that can need their queries, and a
step that computes a prompt replays no decode graph (``runner_v1``, ``runner_v2``). Decode windows,
and all that becomes latents, are compacted after the forward pass of all layers (``Batch.finish``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kv_policies.compaction import Layer, Pages, compact
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.columns import LatentColumns
from kv_policies.latents.fixed import FixedColumns, FixedView
from kv_policies.latents.packing import Packer, Packings, fresh_blocks
from kv_policies.latents.reading import LatentView, Reading
from kv_policies.layout.step import Step
from kv_policies.layout.view import LiveColumns, LiveView
from kv_policies.plan import Work
from kv_policies.planner import Planner
from kv_policies.recent_queries import Storing
from kv_policies.windows import JoinedPages, compact_windows
from vllm_plugin.kv_cache.batch import Batch
from vllm_plugin.kv_cache.passes import restricted
from vllm_plugin.kv_cache.quantized import plain_queries

_PARTS = "vllm_compress_parts"


@dataclass(frozen=True)
class Part:
    """One pass of a step through a layer: attend, then work.

    A step has one part, unless a resumed request recomputes past a segment's end: see
    ``Layout.substeps``.

    Attributes:
        tokens: The step's tokens that take part, int64 on the device; None for all.
        metadata: What the backend's builder made of the live blocks.
        storing: Queries that are stored for decode windows.
        work: What is compacted after attention, inside the forward pass.
        reading: The requests whose attention is over latents too. Its result takes the place of
            the kernel's, which is not asked where these are all requests.
    """

    tokens: torch.Tensor | None
    metadata: Any
    work: Work | Packings | None
    reading: Reading | None = None
    storing: Storing | None = None


class CompressedBuilder:
    """Gives the backend's builder the live blocks only, and plans what is to be compacted.

    The worker sets ``batch`` and ``columns``, and ``planner`` where something is compacted, with
    ``layers`` and ``joined`` where tokens are chosen, or ``latents``, ``pages``, ``latent_columns``
    and ``fixed_columns`` where kept blocks are latents. Without them, as in profiling, nothing is
    compressed.
    """

    # A group of an equal spec would otherwise get this group's metadata with the raw table.
    supports_update_block_table = False

    kv_cache_spec: Any
    vllm_config: Any
    layer_names: list[str]
    batch: Batch | None = None
    columns: LiveColumns | None = None
    planner: Planner | Packer | None = None
    layers: Sequence[Layer] = ()
    joined: JoinedPages | None = None
    latents: Sequence[LatentCache] = ()
    pages: Sequence[Pages] = ()
    latent_columns: LatentColumns | None = None
    fixed_columns: FixedColumns | None = None
    _live: LiveView | None = None
    _latents: LatentView
    _fixed: FixedView

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode steps, in one graph."""
        theirs = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        ours = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(theirs, ours, key=lambda support: support.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any
    ) -> Any:
        build = super().build  # type: ignore[misc]
        if self.batch is None:
            return build(common_prefix_len, common_attn_metadata, *args)
        layout, step = self.kv_cache_spec.layout, self.batch.current(common_attn_metadata)
        if self._live is None:
            self._live = LiveView(layout, self.columns)
            self._latents = LatentView(layout, self.latent_columns)
            self._fixed = FixedView(layout, self.fixed_columns)
        self._clear(step, common_attn_metadata.block_table_tensor)
        parts, tallies = [], []
        for some, passed in step.passes(layout):
            metadata, how, tokens = common_attn_metadata, args, None
            live, latents = self._live, self._latents
            rows = self.vllm_config.scheduler_config.max_num_seqs
            if some is not None:  # rare: what is kept from step to step is of whole steps
                metadata, tokens = restricted(metadata, step, passed, some)
                live, latents, rows, how = LiveView(layout), LatentView(layout), 0, (True,)
            table = metadata.block_table_tensor
            work = self._work(passed, table)
            tallies += work.tallies if work else []
            storing = None
            if self.layers and self.layers[0].recent is not None:
                assert self.batch.recent is not None
                storing = self.batch.recent.storing(passed, metadata.seq_lens)
            view, seen = live.update(passed, table, metadata.seq_lens, rows)
            reading = None
            if self.latents and tokens is None and self._replayable(metadata):
                reading = self._fixed.update(passed, table, view, seen, rows)
            elif self.latents:
                reading = latents.update(passed, table, view)
            metadata = metadata.replace(
                block_table_tensor=view, seq_lens=seen, _num_computed_tokens_cache=None
            )
            # Passes are built fast: FlashAttention keeps one schedule for all that is built.
            part_metadata = build(common_prefix_len, metadata, *how)
            work = self._in_forward(work, whole=tokens is None)
            parts.append(Part(tokens, part_metadata, work, reading, storing))
        if tallies:
            self.batch.activity.plan(tallies, len(self.layer_names))
        setattr(parts[0].metadata, _PARTS, parts)
        return parts[0].metadata

    def _clear(self, step: Step, table: torch.Tensor) -> None:
        """Clear blocks that this step begins to fill, before its forward pass."""
        assert self.batch is not None
        if not self.latents or not self.batch.active:
            return
        if (fresh := fresh_blocks(self.kv_cache_spec.layout, step, table)) is not None:
            for latents in self.latents:
                latents.clear(fresh)

    def _replayable(self, metadata: CommonAttentionMetadata) -> bool:
        """Whether a decode graph can stand for a step: then it reads what the graph reads."""
        mode = self.vllm_config.compilation_config.cudagraph_mode
        one_each = metadata.num_actual_tokens == metadata.num_reqs and metadata.max_query_len == 1
        return bool(mode.has_full_cudagraphs()) and one_each

    def _in_forward(self, work: Work | Packings | None, whole: bool) -> Work | Packings | None:
        """What is left for the forward pass, once what needs no queries is put off until after it.

        Args:
            work: All that a pass has to do.
            whole: Whether the step has no other pass, which would read what this one compacts.
        """
        assert self.batch is not None
        if isinstance(work, Work) and whole:
            if work.windows:
                windows = partial(compact_windows, work.windows, self.layers, self.joined)
                self.batch.put_off(windows)
            work = replace(work, windows=[]) if work.prompts else None
        elif work is not None and whole:
            assert isinstance(work, Packings)
            self.batch.put_off(partial(self._pack, work))
            work = None
        if work is not None:
            self.batch.expect(len(self.layer_names))
        return work

    def _pack(self, work: Packings) -> None:
        for latents, pages in zip(self.latents, self.pages, strict=True):
            latents.pack(work.parts, pages)

    def _work(self, step: Step, table: torch.Tensor) -> Work | Packings | None:
        if self.planner is None:
            return None
        return self.planner.work(self.kv_cache_spec.layout, step, table)


class CompressedImpl:
    """Runs the backend's attention on the live blocks, then what the step has to do.

    The worker sets ``pages``, ``batch``, and ``chosen`` or ``latents``.
    """

    pages: Pages
    batch: Batch
    chosen: Layer
    latents: LatentCache | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[tokens, Hq, D] in ``query`` to ``output``, as the backend's own forward."""
        forward = super().forward  # type: ignore[misc]
        parts = getattr(attn_metadata, _PARTS, None)
        if parts is None:
            return forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        scale: float = self.scale  # type: ignore[attr-defined]
        for part in parts:
            if part.reading is None or not part.reading.whole:
                some = (query, key, value, output)
                if part.tokens is not None:
                    some = tuple(x[part.tokens] for x in some)
                q, k, v, out = some
                forward(layer, q, k, v, kv_cache, part.metadata, out, *args, **kwargs)
                if part.tokens is not None:
                    output[part.tokens] = out
            if part.reading is not None:
                assert self.latents is not None
                self.latents.attend(part.reading, self.pages, query, scale, output)
            if part.storing is not None:
                self._store(part.storing, plain_queries(query, layer, output.dtype))
            if part.work is not None:
                with self.batch.working():
                    if isinstance(part.work, Packings):
                        assert self.latents is not None
                        self.latents.pack(part.work.parts, self.pages)
                    else:
                        observed = plain_queries(query, layer, output.dtype)
                        compact(part.work, self.chosen, observed)
        return output

    def _store(self, storing: Storing, query: torch.Tensor) -> None:
        """Store some queries of a step, [tokens, Hq, D], for the decode windows that they end."""
        stored, first = self.chosen.recent, self.chosen.first_recent
        assert stored is not None
        some = query[storing.tokens]
        stored[first:].index_copy_(0, storing.places[: len(some)], some)


class CustomBackend:
    """Names a backend CUSTOM, so that FLASH_ATTN and TRITON_ATTN stay vLLM's own.

    CUSTOM is one name for the whole process, reserved for compressed layers: ``backends`` refuses
    an engine where another class is registered there.
    """

    # New in vLLM 0.33, for layers that attend without a cache.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"
