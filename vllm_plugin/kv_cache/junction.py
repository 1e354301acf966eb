# SPDX-License-Identifier: Apache-2.0
"""Prefix hits of models that have sliding windows beside compressed layers.

A hit is as long as the shortest of all groups of layers. A compressed group hits up to its first
block that is overwritten. vLLM keeps a window where a request ends, which lies behind that, and
where it was told that another request will go on: at ``shared_prefix_boundary``. So a request is
told, before its first step, where a hit in its prompt will end.

States are left out: one exists only where a step ended, so the prompt would be cut there, which no
engine has run yet.
"""

from collections.abc import Sequence

from vllm.v1.core.single_type_kv_cache_manager import (
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from kv_policies.layout.base import Layout
from vllm_plugin.kv_cache.manager import CompressedManager


class Junction:
    """Tells requests where windows are kept for those that repeat their prompt.

    Args:
        managers: Of all groups of layers.
    """

    def __init__(self, managers: Sequence[SingleTypeKVCacheManager]) -> None:
        sparse = any(isinstance(one, SlidingWindowManager) for one in managers)
        sparse &= not any(isinstance(one, MambaManager) for one in managers)
        layouts = [one.layout for one in managers if isinstance(one, CompressedManager)]
        self._layouts: list[Layout] = layouts if sparse else []

    def tell(self, request: Request) -> None:
        """Set a request's boundary, unless vLLM has seen another request go on elsewhere."""
        n = request.num_prompt_tokens
        ends = [layout.hit_limit(n) for layout in self._layouts if layout.first_destination(n)]
        if ends and not request.shared_prefix_boundary:
            request.shared_prefix_boundary = min(ends)
