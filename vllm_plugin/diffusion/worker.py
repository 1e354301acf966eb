# SPDX-License-Identifier: Apache-2.0
"""A worker whose step is a denoising step. It works with both of vLLM's model runners.

The runner loads the model, allocates the cache and creates the metadata builders. It does not run
the model: a batch of a runner consists of consecutive tokens, whereas a denoising step computes any
positions, and more of them in some layers than in others.
"""

from dataclasses import dataclass, field, replace

import torch
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import (
    KVConnectorModelRunnerMixin as Connector,
)
from vllm.v1.worker.worker_base import CompilationTimes

from dllm_denoising.memory import StepMemory
from vllm_plugin.diffusion.activity import Activity
from vllm_plugin.diffusion.batch import advance, next_rows
from vllm_plugin.diffusion.forward import Forward
from vllm_plugin.diffusion.graphs import GRAPH, PADDED_ON, Shape, shapes
from vllm_plugin.diffusion.prediction import predictions
from vllm_plugin.diffusion.probe import Probe
from vllm_plugin.diffusion.running import Running, RunningRequests
from vllm_plugin.diffusion.support import policy_of, settings_of
from vllm_plugin.kv_cache.pages import Pages
from vllm_plugin.transient import reserve

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


@dataclass
class DenoisedOutput(ModelRunnerOutput):
    """A step's output. ``next_rows`` is what each request's next step takes of the token budget."""

    next_rows: dict[str, int] = field(default_factory=dict)


class DiffusionWorker(PlatformWorker):
    """The platform's worker, which denoises instead of decoding."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Tag all layers as non-causal. vLLM then disables chunked prefill and prefix caching."""
        return {
            name: replace(spec, non_causal=True)
            for name, spec in super().get_kv_cache_spec().items()
        }

    def determine_available_memory(self) -> int:
        """Return the bytes for the KV cache, without the transient memory of a step."""
        model, scheduler = self.model_config, self.vllm_config.scheduler_config
        block = self.cache_config.block_size
        needed = self._memory.most(
            rows=scheduler.max_num_batched_tokens,
            requests=scheduler.max_num_seqs,
            length=-(-model.max_model_len // block) * block,
            watches=bool(policy_of(self.vllm_config).tracks),
        )
        if self.device.type == "cuda":
            needed += GRAPH * len(self._shapes)
        return reserve(
            self,
            super().determine_available_memory,
            needed,
            "a denoising step",
            "--max-num-batched-tokens or --max-model-len",
        )

    @property
    def _memory(self) -> StepMemory:
        model, parallel = self.model_config, self.parallel_config
        return StepMemory(
            vocabulary=model.get_vocab_size(),
            width=model.get_hidden_size(),
            itemsize=model.dtype.itemsize,
            heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, and find out where each layer's keys are."""
        super().initialize_from_config(kv_cache_config)
        (groups,) = self.model_runner.attn_groups
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [layer.self_attn.attn for layer in self.model_runner.get_model().model.layers]
        self._layers = len(layers)
        at = {layer.layer_name: index for index, layer in enumerate(layers)}
        builders = [
            (group.get_metadata_builder(), {name: at[name] for name in group.layer_names})
            for group in groups
            if isinstance(context[group.layer_names[0]], Attention)
        ]
        shapes, block_size = self._shapes, groups[0].kv_cache_spec.block_size
        model = self.model_runner.get_model()
        self.forward = Forward(self.vllm_config, model, builders, shapes, self.device)
        settings = settings_of(self.vllm_config)
        self._pages = None
        if settings.build().tracks:
            self._pages = [
                Pages.of_layer(layer, layer.num_kv_heads, block_size, layer.head_size)
                for layer in layers
            ]
        self._running = RunningRequests(
            settings,
            mask=self._mask,
            layers=self._layers,
            block_size=block_size,
            max_model_len=self.model_config.max_model_len,
            seed=self.model_config.seed,
        )
        self.activity = Activity(len(layers))
        if has_kv_transfer_group() and get_tp_group().rank_in_group == 0:
            get_kv_transfer_group().denoising = self.activity

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up and capture the forward passes of padded steps, as vLLM does its own."""
        times = super().compile_or_warm_up_model()
        with torch.inference_mode():
            self.forward.capture()
        return times

    @property
    def _shapes(self) -> list[Shape]:
        """What steps are padded to.

        Nothing where the policy watches attention, which reads more than rows of a fixed number,
        and where the user asked for no graphs.
        """
        eager = self.model_config.enforce_eager or self.device.type not in PADDED_ON
        if eager or policy_of(self.vllm_config).tracks:
            return []
        length = self.model_config.max_model_len
        blocks = -(-length // self.cache_config.block_size)
        return shapes(self.scheduler_config.max_num_seqs, blocks, length)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one denoising step of each scheduled request."""
        self._running.update(scheduler_output)
        ids = list(scheduler_output.num_scheduled_tokens)
        if not ids:
            if not has_kv_transfer_group():
                return EMPTY_MODEL_RUNNER_OUTPUT
            return Connector.kv_connector_no_forward(scheduler_output, self.vllm_config)
        return self._step(ids, scheduler_output)

    @torch.inference_mode()
    def _step(self, ids: list[str], scheduled: SchedulerOutput) -> DenoisedOutput:
        batch = [self._running[name] for name in ids]
        prepared = self.forward.prepare(batch)
        probe = None
        if self._pages is not None:
            heads = self.model_config.hf_config.num_attention_heads
            reduce = get_tp_group().all_reduce
            probe = Probe(batch, prepared, self._pages, self._memory, heads, reduce)
        with (
            set_forward_context(None, self.vllm_config),  # which connectors ask for
            Connector.maybe_get_kv_connector_output(scheduled) as connector_output,
        ):
            hidden = self.forward(prepared, probe)
            found = self._predicted(batch, hidden, prepared.active)
            seen = None
            if probe is not None:
                seen = probe.observations(*map(self._agreed, probe.seen()))
            for one in batch:
                self.activity.step(one.denoiser)
            final = advance(batch, found, seen)
            for one, tokens_now in zip(batch, final, strict=True):
                self.activity.ended(one.denoiser, len(tokens_now))
        return DenoisedOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=final,
            kv_connector_output=connector_output,
            next_rows={
                name: next_rows(one.denoiser, self._layers)
                for name, one in zip(ids, batch, strict=True)
            },
        )

    def _predicted(
        self, batch: list[Running], hidden: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        """Return what was predicted of the active positions, the same on all ranks."""
        found = predictions(
            batch,
            hidden,
            active,
            self.model_runner.get_model().compute_logits,
            self._mask,
            self._memory.predicted_rows,
        )
        if found is None:
            found = torch.empty(2, len(active), dtype=torch.float64, device=self.device)
        return self._agreed(found)

    def _agreed(self, found: torch.Tensor) -> torch.Tensor:
        """Return what the first rank found. Ranks must not differ, not even by rounding."""
        return get_tp_group().broadcast(found)

    @property
    def _mask(self) -> int:
        return self.model_config.hf_config.mask_token_id
