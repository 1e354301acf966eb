# SPDX-License-Identifier: Apache-2.0
"""Sliding windows beside compressed layers: kept where a prefix-cache hit of both can end."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as
from vllm.v1.request import Request

from kv_policies.layout.base import Layout
from vllm_plugin.kv_cache.hits import hit_end


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A layer with a sliding window, in a model that has compressed layers.

    Attributes:
        layouts: Of all compressed layers of the model.
    """

    layouts: tuple[Layout, ...]

    @classmethod
    def of(
        cls, spec: SlidingWindowSpec, layouts: tuple[Layout, ...], block_size: int
    ) -> "WindowSpec":
        """The same cache beside these layouts, in blocks of so many tokens."""
        return replace_as(spec, cls, layouts=layouts, block_size=block_size)


class WindowManager(SlidingWindowManager):
    """vLLM's manager of windows, with one place more in each prompt at which a window is kept.

    The blocks of that window stay in the prefix cache when the request leaves them behind. As all
    cached blocks they can be evicted when memory is needed.
    """

    kv_cache_spec: WindowSpec

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash what a later request can hit: also the window where compressed layers end a hit."""
        if num_tokens // self.block_size > self.num_cached_block.get(request.request_id, 0):
            end = hit_end(self.kv_cache_spec.layouts, request.num_prompt_tokens)
            replay_boundaries = (*replay_boundaries, end)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )
