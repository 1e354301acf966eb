# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: which blocks a request gives back, and which may be shared."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kv_policies.layout.base import Layout
from vllm_plugin.kv_cache.requests import asked, opts_out
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.windows import WindowManager, WindowSpec


class CompressedManager(FullAttentionManager):
    """Full attention that frees ``Layout.freed`` once the step that compacted it has settled.

    Blocks that a request will overwrite are never hashed and never found in the cache, so shared
    blocks hold what their hash says for as long as they live. The scheduler hands over whole
    requests only where blocks are hashed, so nobody can opt out without prefix caching
    (``requests`` refuses it).
    """

    # Hits end at block boundaries: a part of a block could be one that is overwritten.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: CompressedSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.layout = kv_cache_spec.layout
        if kv_cache_spec.most_blocks is not None:
            # As for sliding windows: a request is admitted if this fits, not all of its prompt.
            self.max_admission_blocks_per_request = kv_cache_spec.most_blocks
        self.freed_blocks = 0  # given back to the pool by compaction, since the start
        self._freed_until: dict[str, tuple[int, int]] = {}  # prompt length, computed tokens
        self._saved: dict[str, int] = {}  # columns of a running request that compaction freed
        self._hashed: dict[str, Request] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what is compacted after ``processed_computed_tokens``, steps in flight excluded."""
        if num_prompt_tokens is None:
            return
        length, after = self._freed_until.get(request_id, (num_prompt_tokens, 0))
        if length != num_prompt_tokens:
            raise _streamed(request_id)
        if processed_computed_tokens <= after:
            return
        request = self._hashed.get(request_id)
        if request is not None and opts_out(request.sampling_params):
            return
        self._freed_until[request_id] = num_prompt_tokens, processed_computed_tokens
        before = self.block_pool.get_num_free_blocks()
        layout = self.layout if request is None else self._layout(request)
        n = layout.head(num_prompt_tokens)
        for first, stop in layout.freed(n, processed_computed_tokens, after):
            self._remove_blocks_in_range(request_id, first, stop)
            self._saved[request_id] = self._saved.get(request_id, 0) + stop - first
        self.freed_blocks += self.block_pool.get_num_free_blocks() - before

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash a request's blocks in front of the first one that is ever overwritten."""
        if request.resumable:
            raise _streamed(request.request_id)
        self._hashed[request.request_id] = request
        if not opts_out(request.sampling_params):
            layout = self._layout(request)
            num_tokens = layout.cacheable(layout.head(request.num_prompt_tokens), num_tokens)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def _layout(self, request: Request) -> Layout:
        """What a request asked for, or what is served."""
        amount = asked(request.sampling_params)
        if isinstance(amount, int) and not request.skip_reading_prefix_cache:
            raise RuntimeError(
                f"request {request.request_id} asks for a budget of its own and may have hit the "
                "prefix cache; it would overwrite blocks of others"
            )
        return self.layout.for_request(amount)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that is finished or preempted."""
        self._freed_until.pop(request_id, None)
        self._saved.pop(request_id, None)
        request = self._hashed.pop(request_id, None)
        if request is not None:
            # When it resumes, its hashes cover generated tokens too, so that the prompt's length,
            # and with it how far a hit may reach, could not be told from them.
            request.skip_reading_prefix_cache = True
        return super().pop_blocks_for_free(request_id)

    @property
    def saved_blocks(self) -> int:
        """Blocks that running requests would hold in addition without compaction."""
        return sum(self._saved.values())

    @property
    def most_live_tokens(self) -> int:
        """Tokens of the blocks that a running request holds, the most of all."""
        tables = self.req_to_blocks.items()
        blocks = max((len(table) - self._saved.get(name, 0) for name, table in tables), default=0)
        return blocks * self.block_size

    @property
    def columns(self) -> int:
        """Blocks that running requests would hold without compaction."""
        return sum(map(len, self.req_to_blocks.values()))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest hit in front of the first block that the request will overwrite itself."""
        layout = kv_cache_spec.layout
        # ``max_length`` is not the prompt's length minus one in every call. The hashes tell the
        # full blocks of the prompt, and these are all that the layout needs.
        full = len(block_hashes) * block_pool.hash_block_size // layout.block_size
        return super().find_longest_cache_hit(
            block_hashes,
            layout.cacheable(layout.head(full * layout.block_size), max_length),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )


def register() -> None:
    """Tell vLLM which managers serve our specs, in every process. May be called again."""
    # An entry of ours alone would make vLLM believe that its own were there already.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(CompressedSpec, CompressedManager)
    KVCacheSpecRegistry.register(WindowSpec, WindowManager)


def _streamed(request_id: str) -> RuntimeError:
    """Ends the engine: better than blocks that hold somebody else's tokens."""
    return RuntimeError(
        f"request {request_id} streams its prompt in; KV compression needs the whole prompt at "
        "once. Send it as one prompt, or serve without compress.kv"
    )
