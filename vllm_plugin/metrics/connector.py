# SPDX-License-Identifier: Apache-2.0
"""A KV connector that moves no KV cache.

Connectors are vLLM's typed channel from workers and scheduler to the metrics of the front end.
"""

import os
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from compress_common.errors import CompressError
from vllm_plugin.diffusion.activity import Activity as Denoising
from vllm_plugin.diffusion.activity import Done as Denoised
from vllm_plugin.kv_cache.activity import Activity, Done
from vllm_plugin.kv_cache.manager import CompressedManager
from vllm_plugin.kv_cache.requests import asked, opts_out
from vllm_plugin.kv_cache.states import StateConnector
from vllm_plugin.metrics.cpu_cores import reserve_as_stock
from vllm_plugin.metrics.prometheus import CompressMetrics, publish
from vllm_plugin.metrics.stats import CompressStats
from vllm_plugin.quantization.speculative import drafts_with_a_model
from vllm_plugin.self_check import log_table
from vllm_plugin.settings import Settings, parse_settings

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown


def block_bytes_of(config: KVCacheConfig) -> int:
    """Return the bytes of one block of the pool.

    The groups of a pool lie over each other: each has tensors of the size of the whole pool.
    """
    pool = max((tensor.size for tensor in config.kv_cache_tensors), default=0)
    return pool // config.num_blocks


class StatsConnector(StateConnector):
    """Reports what compression did since the last step.

    The scheduler's instance counts requests and blocks, from the cache managers that free them. The
    worker's instance counts what was compacted or denoised, from the ``activity`` or ``denoising``
    that the worker hands over. All ranks do the same, so only the first hands it over.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.activity: Activity | None = None
        self.denoising: Denoising | None = None
        self._stats = CompressStats()
        self._managers: list[CompressedManager] = []
        self._freed = 0
        self._gauges: dict[str, float] = {}
        self._peak = 0.0
        if role is KVConnectorRole.SCHEDULER:
            settings = parse_settings(vllm_config.additional_config)
            log_table(vllm_config, settings, kv_cache_config.num_blocks)
        self._block_bytes = block_bytes_of(kv_cache_config)

    def get_kv_connector_stats(self) -> CompressStats | None:
        """Return what is new since the last call, or None if nothing is."""
        if self._managers:
            self._read_managers()
        if self.activity is not None:
            self._read_activity(self.activity.take())
        if self.denoising is not None:
            self._read_denoising(self.denoising.take())
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, CompressStats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CompressStats:
        return CompressStats(data)

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> CompressMetrics:
        return CompressMetrics(*args)

    # -- the scheduler's instance ----------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        self._managers = [one for one in managers if isinstance(one, CompressedManager)]

    def _read_managers(self) -> None:
        freed = sum(manager.freed_blocks for manager in self._managers)
        self._stats.add("kv_freed_blocks", freed - self._freed)
        self._stats.add("kv_freed_bytes", (freed - self._freed) * self._block_bytes)
        self._freed = freed
        saved = sum(manager.saved_blocks for manager in self._managers)
        columns = sum(manager.columns for manager in self._managers)
        self._peak = max(self._peak, saved * self._block_bytes)
        gauges = {
            "kv_saved_bytes": saved * self._block_bytes,
            "kv_saved_bytes_peak": self._peak,
            "kv_live_tokens_max": max(manager.most_live_tokens for manager in self._managers),
            "kv_kept_ratio": 1 - saved / columns if columns else 1.0,
        }
        for name, value in gauges.items():
            if self._gauges.get(name) != value:
                self._stats.set(name, value)
        self._gauges = gauges

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Count a request whose prompt was computed."""
        if self._managers and request.num_computed_tokens >= request.num_prompt_tokens:
            reason = self._reason_to_skip(request)
            if reason is None:
                self._stats.add("kv_eligible_requests", 1)
            else:
                self._stats.add("kv_skipped_requests", 1, reason)
        return super().request_finished_all_groups(request, block_ids)

    def _reason_to_skip(self, request: Request) -> str | None:
        n = request.num_prompt_tokens
        if opts_out(request.sampling_params):
            return "opted_out"
        amount = asked(request.sampling_params)
        layouts = [manager.layout.for_request(amount) for manager in self._managers]
        # Windows too: a budget may leave a prompt whole, and evict generated tokens.
        if any(layout.freed(layout.head(n), request.num_computed_tokens) for layout in layouts):
            return None
        return "short_prompt" if n < layouts[0].min_prompt else "nothing_to_evict"

    # -- a worker's instance ---------------------------------------------------------------------

    def _read_activity(self, done: Done) -> None:
        for kind, count in done.segments.items():
            self._stats.add("kv_compactions", count, kind)
        self._stats.add("kv_tokens", done.tokens)
        self._stats.add("kv_evicted_tokens", done.evicted)
        if done.seconds:
            self._stats.took(done.seconds)

    def _read_denoising(self, done: Denoised) -> None:
        self._stats.add("diffusion_steps", done.steps)
        self._stats.add("diffusion_refreshes", done.refreshes)
        self._stats.add("diffusion_token_layers", done.token_layers, "computed")
        self._stats.add("diffusion_token_layers", done.full_token_layers, "full")
        self._stats.add("diffusion_tokens", done.tokens)
        self._stats.add("diffusion_requests", done.requests)
        self._stats.add("diffusion_request_steps", done.steps_of)


def report(config: VllmConfig, settings: Settings) -> None:
    """Have this engine report what it compresses.

    vLLM has one connector. The config edge allows a user's own beside quantized weights only. Their
    figures are known before the first request, so they are published without a connector.

    Args:
        config: Completed in place, unless it names a connector.
        settings: The ``compress`` section.
    """
    chosen = config.kv_transfer_config
    if not settings.metrics:
        log_table(config, settings)
        states = config.model_config.is_hybrid and config.cache_config.enable_prefix_caching
        if settings.kv is not None and states:
            _connect(config, StateConnector)
        return
    if chosen is None:
        _connect(config, StatsConnector)
        return
    children = chosen.kv_connector_extra_config.get("connectors", ())
    names = {chosen.kv_connector, *(child.get("kv_connector") for child in children)}
    if StatsConnector.__name__ not in names:
        try:
            publish(config)
            log_table(config, settings)
        except Exception as error:  # figures must not end an engine that could serve
            logger.warning(
                "The figures of vllm-compress-plugin are missing from /metrics: %s: %s",
                type(error).__name__,
                error,
            )


def _connect(config: VllmConfig, kind: type[StateConnector]) -> None:
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if (
        expandable
        and drafts_with_a_model(config)
        and not config.model_config.enable_cumem_allocator
    ):
        # vLLM would say so when it makes the draft's config: once the target's weights are loaded.
        raise CompressError(
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: vLLM refuses it beside a draft "
            "model and a KV connector, and figures travel through a connector; unset it, or do "
            "without figures: --additional-config.compress.metrics false"
        )
    # A consumer would make the scheduler hold back blocks that are freed.
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=kind.__name__, kv_connector_module_path=kind.__module__, kv_role="kv_producer"
    )
    reserve_as_stock(config)
