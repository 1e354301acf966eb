# SPDX-License-Identifier: Apache-2.0
"""A worker whose step is a denoising step, with either of vLLM's model runners.

The runner loads the model, allocates the cache and makes the metadata builders, alike in both. It
does not run the model: its batch is of tokens that follow each other, and a denoising step is of
any positions, more of them in some layers than in others.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import (
    KVConnectorModelRunnerMixin as Connector,
)

from dllm_denoising.denoiser import Denoiser
from vllm_plugin.diffusion.activity import Activity
from vllm_plugin.diffusion.batch import Running, advance, next_rows, predictions, prepare
from vllm_plugin.diffusion.probe import Probe
from vllm_plugin.diffusion.requests import canvas_length, decoding_of
from vllm_plugin.diffusion.step import DenoiseStep
from vllm_plugin.diffusion.support import settings_of
from vllm_plugin.kv_cache.pages import Pages

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


@dataclass
class DenoisedOutput(ModelRunnerOutput):
    """next_rows: what the next step of each request takes of the token budget."""

    next_rows: dict[str, int] = field(default_factory=dict)


class DiffusionWorker(PlatformWorker):
    """The platform's worker: it loads model and cache, and denoises in place of decoding."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """All layers non-causal: vLLM then switches chunked prefill and prefix caching off."""
        return {
            name: replace(spec, non_causal=True)
            for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, and learn where each layer's keys lie in it."""
        super().initialize_from_config(kv_cache_config)
        (groups,) = self.model_runner.attn_groups
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [layer.self_attn.attn for layer in self.model_runner.get_model().model.layers]
        self._layers = len(layers)
        at = {layer.layer_name: index for index, layer in enumerate(layers)}
        self._builders = [
            (group.get_metadata_builder(), {name: at[name] for name in group.layer_names})
            for group in groups
            if isinstance(context[group.layer_names[0]], Attention)
        ]
        self._block_size = groups[0].kv_cache_spec.block_size
        self._settings = settings_of(self.vllm_config)
        self._pages = None
        if self._settings.build().tracks:
            self._pages = [
                Pages.of_layer(layer, layer.num_kv_heads, self._block_size, layer.head_size)
                for layer in layers
            ]
        self._running: dict[str, Running] = {}
        self._seeds = np.random.default_rng(self.model_config.seed)
        self.activity = Activity(len(layers))
        if has_kv_transfer_group() and get_tp_group().rank_in_group == 0:
            get_kv_transfer_group().denoising = self.activity

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """One denoising step of each scheduled request."""
        for request_id in scheduler_output.finished_req_ids:
            self._running.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            if request.req_id in self._running:  # Model Runner V2's form of a resumed request
                self._resume(request.req_id, request.block_ids[0])
            else:
                self._running[request.req_id] = self._admitted(request)
        cached = scheduler_output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self._resume(name, blocks[0])
        ids = list(scheduler_output.num_scheduled_tokens)
        if not ids:
            if not has_kv_transfer_group():
                return EMPTY_MODEL_RUNNER_OUTPUT
            return Connector.kv_connector_no_forward(scheduler_output, self.vllm_config)
        return self._step(ids, scheduler_output)

    @torch.inference_mode()
    def _step(self, ids: list[str], scheduled: SchedulerOutput) -> DenoisedOutput:
        batch = [self._running[name] for name in ids]
        model, layers = self.model_runner.get_model(), self._layers
        prepared = prepare(batch, layers, self.device)
        probe = None
        if self._pages is not None:
            heads = self.model_config.hf_config.num_attention_heads
            probe = Probe(batch, prepared, self._pages, heads, get_tp_group().all_reduce)
        metadata, slots = {}, {}
        for builder, indices in self._builders:
            built = {first: builder.build(0, common) for first, common in prepared.metadata.items()}
            for name, index in indices.items():
                stage = [one for one in prepared.stages if one.first <= index][-1]
                metadata[name], slots[name] = built[stage.first], stage.slots
        first = prepared.stages[0]
        with (
            set_forward_context(
                metadata, self.vllm_config, num_tokens=len(first.positions), slot_mapping=slots
            ),
            Connector.maybe_get_kv_connector_output(scheduled) as connector_output,
        ):
            hidden = model(
                prepared.tokens, first.positions, step=DenoiseStep(prepared.stages, probe)
            )
            logits = model.compute_logits(hidden[prepared.active])
            confidence, tokens = self._predicted(batch, logits)
            seen = None
            if probe is not None:
                seen = probe.observations(*self._agreed(*probe.seen()))
            for one in batch:
                self.activity.step(one.denoiser)
            final = advance(batch, confidence, tokens, seen)
            for one, tokens_now in zip(batch, final, strict=True):
                self.activity.ended(one.denoiser, len(tokens_now))
        return DenoisedOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=final,
            kv_connector_output=connector_output,
            next_rows={
                name: next_rows(one.denoiser, layers) for name, one in zip(ids, batch, strict=True)
            },
        )

    def _predicted(self, batch: list[Running], logits: torch.Tensor | None) -> list[torch.Tensor]:
        """Probability and token of each active position, the same on all ranks."""
        if get_tp_group().rank_in_group == 0:
            assert logits is not None
            return self._agreed(*predictions(batch, logits, self._mask))
        count = sum(len(one.denoiser.plan.active) for one in batch)
        return self._agreed(
            torch.empty(count, dtype=torch.float64, device=self.device),
            torch.empty(count, dtype=torch.int64, device=self.device),
        )

    def _agreed(self, *found: torch.Tensor) -> list[torch.Tensor]:
        """What the first rank found: ranks that differ in a rounding would part for ever."""
        return [get_tp_group().broadcast(x) for x in found]

    @property
    def _mask(self) -> int:
        return self.model_config.hf_config.mask_token_id

    def _resume(self, name: str, blocks: list[int]) -> None:
        """Go on with a request whose blocks were taken away, in new ones.

        Only ``reset_prefix_cache(reset_running_requests=True)`` takes them. Committed tokens stay,
        as generated ones do in other models.
        """
        denoiser = self._running[name].denoiser
        denoiser.restart()
        self._running[name] = Running.of(denoiser, blocks, self._block_size)

    def _admitted(self, request: NewRequestData) -> Running:
        params, prompt = request.sampling_params, request.prompt_token_ids
        decoding, policy = decoding_of(params, self._settings)
        stops = set(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stops.add(params.eos_token_id)
        denoiser = Denoiser(
            prompt,
            canvas_length(len(prompt), params, self.model_config.max_model_len),
            decoding,
            policy,
            mask=self._mask,
            layers=self._layers,
            stops=stops,
            fill=params.eos_token_id,
            temperature=params.temperature,
            seed=int(self._seeds.integers(2**63)) if params.seed is None else params.seed,
        )
        return Running.of(denoiser, request.block_ids[0], self._block_size)
