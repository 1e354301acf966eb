# SPDX-License-Identifier: Apache-2.0
"""States beside compressed layers: kept where a prefix-cache hit of both can end.

A layer with a state has one where a step of its request ended. So a prompt must be cut there. The
scheduler cuts prompts at ``Request.shared_prefix_boundary``, where vLLM has seen two requests part,
and keeps that state. It asks its KV connector about each request before it cuts the first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_plugin.kv_cache.hits import hit_end
from vllm_plugin.kv_cache.manager import CompressedManager
from vllm_plugin.kv_cache.requests import opts_out


class Boundaries:
    """Has the prompts of a hybrid cut where a hit of its compressed layers ends.

    A request that keeps its whole cache is cut as stock vLLM cuts it.

    Args:
        managers: Of all groups of layers.
    """

    def __init__(self, managers: Sequence[SingleTypeKVCacheManager]) -> None:
        layouts = {one.layout for one in managers if isinstance(one, CompressedManager)}
        states = any(isinstance(one, MambaManager) for one in managers)
        self._layouts = {each for each in layouts if each.share < 1} if states else set()
        self._parting: dict[str, Request] = {}  # those that are cut in front of our place first

    def tell(self, request: Request) -> None:
        """Set the boundary of a request whose first step will be cut next."""
        self.forget(request)
        if not self._layouts or opts_out(request.sampling_params):
            return
        end = hit_end(self._layouts, request.num_prompt_tokens)
        if 0 < request.shared_prefix_boundary < end:
            self._parting[request.request_id] = request
        else:  # vLLM's can lie beyond it, where layers of one level share more than others
            request.shared_prefix_boundary = end

    def scheduled(self, tokens: Mapping[str, int]) -> None:
        """Move on the boundary of each request that reaches vLLM's in this step.

        Args:
            tokens: Scheduled in this step, by request.
        """
        for name, request in list(self._parting.items()):
            reached = request.num_computed_tokens + tokens.get(name, 0)
            if reached >= request.shared_prefix_boundary:
                request.shared_prefix_boundary = hit_end(self._layouts, request.num_prompt_tokens)
                self.forget(request)

    def forget(self, request: Request) -> None:
        """A request is finished, or will be told again."""
        self._parting.pop(request.request_id, None)


class StateConnector(KVConnectorBase_V1, SupportsHMA):
    """A KV connector that moves no KV cache, and tells requests of hybrids their boundary."""

    _boundaries: Boundaries | None = None

    # -- the scheduler's instance ----------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self._boundaries = Boundaries(kv_cache_manager.coordinator.single_type_managers)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Find nothing elsewhere. Called before a request's first step, with the request."""
        if self._boundaries is not None:
            self._boundaries.tell(request)
        return 0, False

    def update_state_after_alloc(self, *args: Any) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return nothing for the workers. Called when a step is scheduled, not yet counted."""
        if self._boundaries is not None:
            self._boundaries.scheduled(scheduler_output.num_scheduled_tokens)
        return _Nothing()

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Let the blocks be freed at once.

        Returns:
            False, None: nothing is sent, and the answer gets no parameters.
        """
        if self._boundaries is not None:
            self._boundaries.forget(request)
        return False, None

    # -- a worker's instance ---------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pass

    def has_connector_metadata(self) -> bool:
        """Return False: attention then calls neither method below, twice a layer in each step."""
        return False

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


class _Nothing(KVConnectorMetadata):
    """The object that vLLM asks for in each step."""
