# SPDX-License-Identifier: Apache-2.0
"""Workers that know layer names and prompt lengths, and hand them to attention."""

from collections import Counter
from collections.abc import Sequence
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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from compress_common.errors import CompressError, joined
from kv_policies.base import KVPolicy, LatentPolicy
from kv_policies.compaction import Layer, describe_windows, observed_bytes, workspace
from kv_policies.latents.bases import Bases
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import LatentColumns
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.view import LiveColumns
from kv_policies.planner import Planner
from kv_policies.workspace import Heads, Workspace
from vllm_plugin.kv_cache.backends import put_ours_behind
from vllm_plugin.kv_cache.batch import Batch
from vllm_plugin.kv_cache.budget import bases_of, layouts_of
from vllm_plugin.kv_cache.joined import join
from vllm_plugin.kv_cache.latent import latent_cache, latent_cache_type, rope_of
from vllm_plugin.kv_cache.pages import Pages
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.support import layer_problems
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
        """The layout of each compressed layer; the specs of all others as they are."""
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
            self.model_config.hf_text_config,
            network if settings.latents else None,
        )
        if supports_realtime(network):
            problems.append("a model that takes its prompt as a stream; remove compress.kv")
        if problems:
            raise joined(problems)
        model = self.model_config
        layouts = layouts_of(
            settings, self.cache_config.block_size, model.model, model.hf_text_config
        )
        self.settings, self.policy = settings, settings.build()
        shares = Counter(float(layout.share) for layout in layouts.values())
        one = next(iter(layouts.values()))
        logger.info(
            "KV cache: %s keeps %s; %d of %d layers compressed, prompts from %d tokens on, %s, "
            "blocks of %d",
            settings.policy,
            ", ".join(f"{share:.3f} of {count} layers" for share, count in sorted(shares.items())),
            len(full),
            len(specs),
            one.min_prompt,
            describe_windows(self.policy, one.window),
            self.cache_config.block_size,
        )
        self._compressed = {
            name: CompressedSpec.of(specs[name], layouts[index]) for name, index in full.items()
        }
        return specs | self._compressed

    def determine_available_memory(self) -> int:
        """What vLLM leaves for the cache, less what compaction takes beside it."""
        measure = super().determine_available_memory
        return reserve(self, measure, self._transient(), "KV compaction", "--max-model-len")

    def _transient(self) -> int:
        """The most bytes that compaction takes: in one layer, and for observations in all."""
        longest, bases = self.model_config.max_model_len, self._bases
        block_size = self.cache_config.block_size
        prompt, prompts = -(-longest // block_size) * block_size, self._partial_prompts
        needed, observed = [0], 0
        for name, spec in self._compressed.items():
            if spec.layout.share == 1:
                continue  # nothing is ever compacted
            heads = self._heads(name, spec)
            if isinstance(self.policy, KVPolicy):
                needed.append(workspace(self.policy, heads).peak(longest))
                observed += prompts * observed_bytes(self.policy, heads, prompt)
            elif bases is not None:
                form = self._form(bases, name, spec)
                kind = latent_cache_type(spec.dtype, self.device)
                features, queries = heads.kv * heads.size, heads.kv * heads.group
                needed.append(kind.peak(form, features, heads.size, longest, queries))
            else:
                raise self._not_compressed(name)
        return max(needed) + observed

    @property
    def _partial_prompts(self) -> int:
        """The most prompts that are not complete after a step.

        The scheduler gives the first what is left of a step's tokens, unless it may take only so
        many. The others get a share too then.
        """
        scheduler = self.vllm_config.scheduler_config
        each = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
        return min(scheduler.max_num_seqs, -(-scheduler.max_num_batched_tokens // each))

    def _not_compressed(self, name: str) -> CompressError:
        """Why a layer cannot be served: its blocks would be freed, but not compacted."""
        return CompressError(
            f"{name}: the policy {self.policy.name!r} neither scores tokens nor keeps latents; "
            "choose another policy"
        )

    def _heads(self, name: str, spec: CompressedSpec) -> Heads:
        """The heads of a layer on this rank."""
        layer = self.vllm_config.compilation_config.static_forward_context[name]
        kv, size = spec.num_kv_heads, spec.head_size
        return Heads(kv, layer.num_heads // kv, size, spec.dtype.itemsize, self.device.type)

    def _form(self, bases: Bases, name: str, spec: CompressedSpec) -> LatentFormat:
        """How the latents of a layer lie in its blocks."""
        assert isinstance(self.policy, LatentPolicy)
        assert isinstance(spec.layout, LatentLayout)
        ranks = bases.ranks(extract_layer_index(name))
        return self.policy.form(*ranks, spec.layout.tokens)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then give layers and builders what they need to compress it."""
        super().initialize_from_config(kv_cache_config)
        groups = [
            group
            for groups in self.model_runner.attn_groups
            for group in groups
            if isinstance(group.kv_cache_spec, CompressedSpec)
        ]
        layers = sum(len(group.layer_names) for group in groups)
        self.batch = Batch(self.model_runner, self.use_v2_model_runner, layers)
        bases = self._bases
        for group in groups:
            self._equip(group, bases)
        self._share_plans(groups)
        if has_kv_transfer_group() and get_tensor_model_parallel_rank() == 0:
            get_kv_transfer_group().activity = self.batch.activity

    def _equip(self, group: Any, bases: Bases | None) -> None:
        """Give a group's builder and layers the batch, the policy, and their blocks."""
        assert self.batch is not None
        spec, builder = group.kv_cache_spec, group.get_metadata_builder()
        if ".".join(group.backend.full_cls_name()) != self._backend:
            raise CompressError(
                f"layers would be served by {group.backend.__name__}, not by {self._backend}: an "
                "engine with other settings ran in this process before; start a new process"
            )
        if builder.kv_cache_spec.block_size != spec.layout.block_size:
            raise CompressError(
                f"the attention kernel splits blocks of {spec.layout.block_size} tokens into "
                f"{builder.kv_cache_spec.block_size}; set --block-size to that"
            )
        builder.batch = self.batch
        builder.layers, builder.latents = [], []
        for name in group.layer_names:
            layer = self.vllm_config.compilation_config.static_forward_context[name]
            impl, index = layer.impl, extract_layer_index(name)
            impl.batch = self.batch
            impl.pages = Pages.of_layer(layer, spec.num_kv_heads, spec.block_size, spec.head_size)
            if isinstance(self.policy, KVPolicy):
                heads = self._heads(name, spec)
                impl.chosen = Layer(
                    name,
                    index,
                    impl.pages,
                    heads,
                    self.policy,
                    workspace(self.policy, heads),
                    self.batch.observations,
                )
                builder.layers.append(impl.chosen)
            elif bases is not None:
                form = self._form(bases, name, spec)
                rope = rope_of(self.model_runner.get_model(), name)
                impl.latents = latent_cache(bases, index, form, impl.pages, rope, layer.kv_cache)
                builder.latents.append(impl.latents)
            elif spec.layout.share != 1:
                raise self._not_compressed(name)
        builder.joined = join([layer.pages for layer in builder.layers])

    def _share_plans(self, groups: Sequence[Any]) -> None:
        """Let the groups whose layouts have one timing share what is planned for a step."""
        timings: dict[Any, list[Any]] = {}
        for group in groups:
            timings.setdefault(group.kv_cache_spec.layout.timing, []).append(group)
        for alike in timings.values():
            layouts = [group.kv_cache_spec.layout for group in alike]
            builders = [group.get_metadata_builder() for group in alike]
            forms = [
                (layout, latents.form)
                for layout, builder in zip(layouts, builders, strict=True)
                for latents in builder.latents
            ]
            columns = LiveColumns(layouts)
            planner: Planner | Packer | None = Packer(forms) if forms else None
            if isinstance(self.policy, KVPolicy):
                planner = Planner(layouts, self.policy, self._space(self.policy, alike))
            latent_columns = LatentColumns(layouts) if forms else None
            for builder in builders:
                builder.columns, builder.planner = columns, planner
                builder.latent_columns = latent_columns

    def _space(self, policy: KVPolicy, groups: Sequence[Any]) -> Workspace:
        """What bounds a part that the layers of all these groups work on."""
        heads = [
            self._heads(name, group.kv_cache_spec) for group in groups for name in group.layer_names
        ]
        spaces = [(workspace(policy, of_layer), of_layer.kv) for of_layer in heads]
        longest = self.model_config.max_model_len
        space, _ = max(spaces, key=lambda pair: pair[0].bytes(1, longest, pair[1]))
        return space

    @cached_property
    def _bases(self) -> Bases | None:
        """The bases of latents; None where tokens are chosen, or nothing is compressed."""
        if not self.settings.keeps_latents:
            return None
        model = self.model_config
        return bases_of(self.settings, model.model, model.hf_text_config)

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
