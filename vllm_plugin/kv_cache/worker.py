# SPDX-License-Identifier: Apache-2.0
"""Workers that know layer names and prompt lengths, and hand them to attention."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_realtime
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import with_gpu_sync_check
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)

from compress_common.errors import joined
from compress_common.structure.wrapper import language_config
from kv_policies.base import KVPolicy
from kv_policies.latents.bases import Bases
from kv_policies.memory import beside_cache
from kv_policies.window_policy import describe_windows
from vllm_plugin.kv_cache.activity import Activity, counting_layer
from vllm_plugin.kv_cache.backends import put_ours_behind
from vllm_plugin.kv_cache.batch import Batch
from vllm_plugin.kv_cache.beside import load_of
from vllm_plugin.kv_cache.budget import bases_of, layouts_of
from vllm_plugin.kv_cache.equipment import Equipment, form_of, heads_of, not_compressed
from vllm_plugin.kv_cache.latent import latent_cache_type
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.support import layer_problems
from vllm_plugin.kv_cache.windows import WindowSpec
from vllm_plugin.page_sizes import block_sizes
from vllm_plugin.settings import parse_settings
from vllm_plugin.transient import reserve

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class CompressedWorker(PlatformWorker):
    """The platform's worker, its full-attention layers compressed as ``compress.kv`` says."""

    batch: Batch | None = None

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self._backend = put_ours_behind(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The layout of each compressed layer, and windows that know it; others as they are."""
        specs = super().get_kv_cache_spec()
        context = self.vllm_config.compilation_config.static_forward_context
        full = {
            name: extract_layer_index(name)
            for name, spec in specs.items()
            if type(spec) is FullAttentionSpec
        }
        settings = parse_settings(self.vllm_config.additional_config).kv
        assert settings is not None, "this worker is only set with compress.kv"
        network = self.model_runner.get_model()
        problems = layer_problems(
            specs,
            full,
            context,
            language_config(self.model_config.hf_config),
            self._stage,
            settings.build().capabilities,
            network if settings.latents else None,
        )
        if supports_realtime(network):
            problems.append("a model that takes its prompt as a stream; remove compress.kv")
        if problems:
            raise joined(problems)
        model = self.model_config
        text = language_config(model.hf_config)
        ranks = self.parallel_config.tensor_parallel_size
        full_size, window_size = block_sizes(text, self.cache_config.block_size, ranks)
        layouts = layouts_of(settings, full_size, model.model, text, ranks)
        self.settings, self.policy = settings, settings.build()
        self._counts_segments = counting_layer(layouts) in self._stage
        self._layers = len(layouts)
        kept = Counter(str(layouts[index]) for index in full.values())
        one = next(iter(layouts.values()))
        self._head = one.head
        logger.info(
            "KV cache: %s, %s; %d of %d layers compressed, prompts from %d tokens on, %s, "
            "blocks of %d",
            settings.policy,
            ", ".join(f"{what} in {count} layers" for what, count in sorted(kept.items())),
            len(full),
            len(specs),
            one.compacted_from,
            describe_windows(self.policy, one.window),
            one.block_size,
        )
        longest, in_flight = model.max_model_len, self.vllm_config.max_in_flight_tokens
        self._compressed = {
            name: CompressedSpec.of(specs[name], layouts[index], longest, in_flight)
            for name, index in full.items()
        }
        every = tuple(dict.fromkeys(layouts.values()))
        windows = {
            name: WindowSpec.of(spec, every, window_size)
            for name, spec in specs.items()
            if type(spec) is SlidingWindowSpec
        }
        return specs | windows | self._compressed

    def determine_available_memory(self) -> int:
        """What vLLM leaves for the cache, less what compaction takes beside it."""
        measure, flags = super().determine_available_memory, "--max-model-len or --max-num-seqs"
        return reserve(self, measure, self._transient(), "KV compaction", flags)

    def _transient(self) -> int:
        """The most bytes that compaction takes: in one layer, and for what is stored in all."""
        compacted = {
            name: spec for name, spec in self._compressed.items() if spec.layout.share != 1
        }
        if not compacted:
            return 0
        if isinstance(self.policy, KVPolicy):
            (name, spec), *_ = compacted.items()
            heads = heads_of(self.vllm_config, name, spec, self.device)
            layouts = [spec.layout for spec in compacted.values()]
            load = load_of(self.vllm_config)
            return beside_cache(self.policy, layouts, heads, load, self.model_config.dtype).total
        return self._transient_of_latents(compacted)

    def _transient_of_latents(self, compacted: Mapping[str, CompressedSpec]) -> int:
        bases, needed = self._bases, []
        for name, spec in compacted.items():
            if bases is None:
                raise not_compressed(self.policy, name)
            heads = heads_of(self.vllm_config, name, spec, self.device)
            form = form_of(self.policy, bases, name, spec)
            kind = latent_cache_type(spec.dtype, self.device)
            features, queries = heads.kv * heads.size, heads.kv * heads.group
            longest = self.model_config.max_model_len
            needed.append(kind.peak(form, features, heads.size, longest, queries))
        # Graphs have memory of their own for what attention over latents takes.
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return max(needed) * (1 + (mode is not None and mode.has_full_cudagraphs()))

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then give layers and builders what they need to compress it."""
        super().initialize_from_config(kv_cache_config)
        groups = [
            group
            for groups in self.model_runner.attn_groups
            for group in groups
            if isinstance(group.kv_cache_spec, CompressedSpec)
        ]
        activity = Activity(self._layers, self._counts_segments)
        self.batch = Batch(self.model_runner, self.use_v2_model_runner, activity, self._head)
        model = self.model_runner.get_model()
        equipment = Equipment(
            self.vllm_config, self.policy, self._bases, self.batch, model, self._backend
        )
        equipment.hand_out(groups)
        if has_kv_transfer_group() and get_tensor_model_parallel_rank() == 0:
            get_kv_transfer_group().activity = activity

    @property
    def _stage(self) -> range:
        """The layers of the model that this worker has: all without pipeline parallelism."""
        return range(*self.model_config.get_layers_start_end_indices(self.parallel_config))

    @cached_property
    def _bases(self) -> Bases | None:
        """The bases of latents; None where tokens are chosen, or nothing is compressed."""
        if not self.settings.keeps_latents:
            return None
        model, ranks = self.model_config, self.parallel_config.tensor_parallel_size
        return bases_of(self.settings, model.model, language_config(model.hf_config), ranks)

    @torch.inference_mode()
    @with_gpu_sync_check
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """One step; metadata is built and layers run inside it. The next uses the same stream."""
        assert self.batch is not None
        with self.batch.step(scheduler_output):
            output = super().execute_model(scheduler_output)
            self.batch.finish()
        return output

    def _make_model_runner(self) -> Any:
        """On a GPU, vLLM's runner, except that it replays no decode graph where a prompt ends."""
        settings = parse_settings(self.vllm_config.additional_config).kv
        if settings is not None and settings.keep == 1:  # then nothing is compacted
            return super()._make_model_runner()
        if self.use_v2_model_runner:
            from vllm_plugin.kv_cache.runner_v2 import CompressedRunnerV2 as Runner
        else:
            from vllm_plugin.kv_cache.runner_v1 import CompressedRunnerV1 as Runner
        return Runner(self.vllm_config, self.device)
