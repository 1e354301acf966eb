# SPDX-License-Identifier: Apache-2.0
"""The worker's side, over any attention backend: what the kernel reads, and when to compact.

``CompressedBuilder`` and ``CompressedImpl`` are mixed in front of a backend's own builder and
implementation, which do everything else.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kv_policies.base import KVPolicy
from kv_policies.compaction import Pages, Work, compact, plan_step
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.plan import Packing, Reading, fresh_blocks, plan_packing, plan_reading
from kv_policies.layout.latents import LatentBlocks
from kv_policies.layout.step import Step
from vllm_plugin.kv_cache.batch import Batch

_PARTS = "vllm_compress_parts"

# Columns of a step's live blocks, tokens that are not among them, and the blocks of latents.
_Places = tuple[torch.Tensor, torch.Tensor, LatentBlocks | None]


@dataclass(frozen=True)
class Part:
    """One pass of a step through a layer: attend, then work.

    tokens: int64, the step's tokens that take part; None for all. A step has one part, unless a
    resumed request recomputes past a segment's end: see ``Layout.substeps``. reading: the requests
    whose attention is over latents too, which takes the place of what the kernel says of them; it
    is not asked where these are all.
    """

    tokens: torch.Tensor | None
    metadata: Any
    work: Work | Packing | None
    reading: Reading | None = None


class CompressedBuilder:
    """Gives the backend's builder the live blocks only, and plans what is to be compacted.

    ``batch`` and ``policy`` are set by the worker; without them (profiling) nothing is compressed.
    Where kept blocks are latents there is no ``policy`` to choose tokens, but ``unit``, the tokens
    of which latents are written at once.
    """

    # A group of an equal spec would otherwise get this group's metadata with the raw table.
    supports_update_block_table = False

    kv_cache_spec: Any
    batch: Batch | None = None
    policy: KVPolicy | None = None
    unit: int | None = None
    fresh: torch.Tensor | None = None  # blocks to clear before this step writes
    _known: tuple[list[str], torch.Size, _Places] | None = None  # of which requests, in order
    _room: tuple[torch.Tensor, torch.Tensor] | None = None  # for what the kernel reads

    @classmethod
    def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
        # Compaction is Python in forward, and a last prompt chunk of one token has a decode's
        # shape: a full graph would be replayed and skip it.
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any
    ) -> Any:
        build = super().build  # type: ignore[misc]
        if self.batch is None or (step := self.batch.current(common_attn_metadata)) is None:
            return build(common_prefix_len, common_attn_metadata, *args)
        layout = self.kv_cache_spec.layout
        if self.unit is not None:
            table = common_attn_metadata.block_table_tensor
            self.fresh = fresh_blocks(layout, step, table)
        passes = step.passes(layout) if step.busy(layout) else [(None, step)]
        parts = []
        for tokens, part in passes:
            metadata = common_attn_metadata
            if tokens is not None:
                metadata = _restricted(metadata, step, part, tokens)
            table = metadata.block_table_tensor
            work = self._work(part, table) if part.busy(layout) else None
            if work is not None:
                layers = len(self.layer_names)  # type: ignore[attr-defined]
                self.batch.activity.plan(work.tallies, layers)
            places = self._places(part, metadata, tokens is None)
            view, seq_lens = self._view(metadata, places, tokens is None)
            reading = None
            if (held := places[2]) is not None:
                reading = plan_reading(layout, held, table, view, seq_lens, part)
            metadata = metadata.replace(
                block_table_tensor=view, seq_lens=seq_lens, _num_computed_tokens_cache=None
            )
            part_metadata = build(common_prefix_len, metadata, *args)
            parts.append(Part(tokens, part_metadata, work, reading))
        setattr(parts[0].metadata, _PARTS, parts)
        return parts[0].metadata

    def _work(self, step: Step, table: torch.Tensor) -> Work | Packing | None:
        layout = self.kv_cache_spec.layout
        if self.unit is not None:
            return plan_packing(layout, self.unit, table, step)
        return None if self.policy is None else plan_step(layout, self.policy, table, step)

    def _places(self, step: Step, metadata: CommonAttentionMetadata, whole: bool) -> _Places:
        """Of a whole step they are computed anew only after one in which something could move."""
        table, lengths = metadata.block_table_tensor, metadata.seq_lens
        layout, busy = self.kv_cache_spec.layout, step.busy(self.kv_cache_spec.layout)
        if whole and not busy and self._known is not None:
            requests, shape, places = self._known
            if (requests, shape) == (step.ids, table.shape):
                return places
        held = None
        if self.unit is not None:
            held = layout.latent_blocks(step.n, step.c, step.opted_out)
        columns, freed = step.moves(layout, table.shape[1], table.device)
        places = columns, freed.to(lengths.dtype), held
        if whole:
            # After a busy step things have moved, so that the next one computes again.
            self._known = None if busy else (step.ids, table.shape, places)
        return places

    def _view(
        self, metadata: CommonAttentionMetadata, places: _Places, whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernel reads, live blocks and tokens seen; of whole steps in the same memory."""
        table, lengths = metadata.block_table_tensor, metadata.seq_lens
        columns, freed, _ = places
        if not whole:
            return table.gather(1, columns), lengths - freed
        room = self._room
        if room is None or room[0].shape[1] != table.shape[1] or len(room[0]) < len(table):
            most = self.vllm_config.scheduler_config.max_num_seqs  # type: ignore[attr-defined]
            most = max(most, len(table))
            self._room = room = table.new_empty(most, table.shape[1]), lengths.new_empty(most)
        view, seen = (memory[: len(table)] for memory in room)
        torch.gather(table, 1, columns, out=view)
        torch.sub(lengths, freed, out=seen)
        return view, seen


def _restricted(
    metadata: CommonAttentionMetadata, step: Step, part: Step, tokens: torch.Tensor
) -> CommonAttentionMetadata:
    """The metadata of one pass: of some requests, some tokens."""
    device, prefilling = metadata.block_table_tensor.device, metadata.is_prefilling
    row = torch.tensor([step.ids.index(name) for name in part.ids])
    starts = torch.zeros(len(row) + 1, dtype=metadata.query_start_loc.dtype)
    torch.cumsum(part.q, 0, out=starts[1:])
    if prefilling is not None:
        prefilling = prefilling[row.to(prefilling.device)]  # on the host also beside a GPU
    row, lengths = row.to(device), (part.c + part.q).int()
    return metadata.replace(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(row),
        num_actual_tokens=len(tokens),
        max_query_len=int(part.q.max()),
        block_table_tensor=metadata.block_table_tensor[row],
        slot_mapping=metadata.slot_mapping[tokens.to(device)],
        positions=None if metadata.positions is None else metadata.positions[tokens.to(device)],
        is_prefilling=prefilling,
    )


class CompressedImpl:
    """Runs the backend's attention on the live blocks, then what the step has to do.

    ``pages``, ``batch``, ``builder`` and ``policy`` or ``latents`` are set by the worker.
    """

    pages: Pages
    batch: Batch
    builder: CompressedBuilder
    policy: KVPolicy
    latents: LatentCache | None = None

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """The backend's own, into blocks that hold nobody's latents any more."""
        if self.latents is not None and self.batch.active and self.builder.fresh is not None:
            self.latents.clear(self.builder.fresh)
        super().do_kv_cache_update(*args, **kwargs)  # type: ignore[misc]

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
            if part.work is not None:
                with self.batch.activity.timed():
                    if isinstance(part.work, Packing):
                        assert self.latents is not None
                        self.latents.pack(part.work, self.pages)
                    else:
                        compact(
                            part.work,
                            self.policy,
                            layer.layer_name,
                            self.pages,
                            query,
                            scale,
                            self.batch.observations,
                        )
        return output
