# SPDX-License-Identifier: Apache-2.0
"""What the worker gives to the builders and layers of compressed groups."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from compress_common.errors import CompressError
from kv_policies.base import KVPolicy, LatentPolicy, Policy
from kv_policies.compaction import Layer, workspace
from kv_policies.latents.bases import Bases
from kv_policies.latents.columns import LatentColumns
from kv_policies.latents.fixed import FixedColumns
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packer
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.view import LiveColumns
from kv_policies.planner import Planner
from kv_policies.recent_queries import RecentQueries
from kv_policies.window_policy import window_queries
from kv_policies.workspace import Heads, Workspace
from vllm_plugin.kv_cache.batch import Batch
from vllm_plugin.kv_cache.joined import join
from vllm_plugin.kv_cache.latent import latent_cache, rope_of
from vllm_plugin.kv_cache.pages import Pages
from vllm_plugin.kv_cache.quantized import FP8
from vllm_plugin.kv_cache.spec import CompressedSpec


class Equipment:
    """Gives builders and layers the batch, the policy and their blocks.

    Args:
        config: vLLM's own, of this engine, with the layers of the loaded model.
        policy: What compresses.
        bases: Of latents; None where tokens are chosen, or nothing is compressed.
        batch: What the worker knows of each step.
        model: As it is loaded.
        backend: Our class, by which layers must be served, as ``module.name``.
    """

    def __init__(
        self,
        config: VllmConfig,
        policy: Policy,
        bases: Bases | None,
        batch: Batch,
        model: torch.nn.Module,
        backend: str,
    ) -> None:
        self._config, self._policy, self._bases = config, policy, bases
        self._batch, self._model, self._backend = batch, model, backend

    def hand_out(self, groups: Sequence[Any]) -> None:
        """Equip vLLM's attention groups, once their cache is allocated.

        Raises:
            CompressError: Another backend serves one, or its kernel splits blocks.
        """
        recent = self._batch.recent = self._recent_queries(groups)
        number = 0
        for group in groups:
            if recent is not None and window_queries(self._policy, group.kv_cache_spec.layout):
                self._equip(group, recent, number)
                number += len(group.layer_names)
            else:
                self._equip(group, None)
        self._share_plans(groups)

    def _recent_queries(self, groups: Sequence[Any]) -> RecentQueries | None:
        """Room for the queries of all layers that score decode windows with them."""
        counts = {
            name: count
            for group in groups
            if (count := window_queries(self._policy, group.kv_cache_spec.layout))
            for name in group.layer_names
        }
        if not counts:
            return None
        name, count = next(iter(counts.items()))
        layer: Any = self._config.compilation_config.static_forward_context[name]
        return RecentQueries(
            count,
            self._config.scheduler_config.max_num_seqs,
            len(counts),
            layer.num_heads,
            layer.head_size,
            layer.dtype,
            layer.kv_cache.device,
        )

    def _equip(self, group: Any, recent: RecentQueries | None, first: int = 0) -> None:
        """Equip a group's builder, and its layers.

        Args:
            group: One of vLLM's.
            recent: Where its layers store queries; None: they store none.
            first: Number of its first layer there.
        """
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
        builder.batch = self._batch
        builder.layers, builder.latents, builder.pages = [], [], []
        for number, name in enumerate(group.layer_names, first):
            layer: Any = self._config.compilation_config.static_forward_context[name]
            impl, index = layer.impl, extract_layer_index(name)
            impl.batch = self._batch
            impl.pages = Pages.of_layer(layer, spec.num_kv_heads, spec.block_size, spec.head_size)
            if isinstance(self._policy, KVPolicy):
                heads = heads_of(self._config, name, spec, layer.kv_cache.device)
                impl.chosen = Layer(
                    name,
                    index,
                    impl.pages,
                    heads,
                    self._policy,
                    workspace(self._policy, heads),
                    self._batch.observations,
                    impl.scale,
                    None if recent is None else recent.stored,
                    0 if recent is None else number * recent.places,
                    getattr(impl, "sinks", None),
                    getattr(impl, "logits_soft_cap", None) or None,  # 0 for none
                )
                builder.layers.append(impl.chosen)
            elif self._bases is not None:
                form = form_of(self._policy, self._bases, name, spec)
                rope = rope_of(self._model, name)
                cache = layer.kv_cache
                shard = get_tensor_model_parallel_rank()
                impl.latents = latent_cache(
                    self._bases, index, shard, form, impl.pages, rope, cache
                )
                impl.latents.warm_up(layer.num_heads)
                builder.latents.append(impl.latents)
                builder.pages.append(impl.pages)
            elif spec.layout.share != 1:
                raise not_compressed(self._policy, name)
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
            if isinstance(self._policy, KVPolicy):
                layers = [layer for builder in builders for layer in builder.layers]
                planner = Planner(layouts, self._policy, self._space(layers), self._batch.recent)
            latent_columns = LatentColumns(layouts) if forms else None
            fixed_columns = FixedColumns(layouts) if forms else None
            for builder in builders:
                builder.columns, builder.planner = columns, planner
                builder.latent_columns, builder.fixed_columns = latent_columns, fixed_columns

    def _space(self, layers: Sequence[Layer]) -> Workspace:
        """What bounds a part that all these layers work on."""
        longest = self._config.model_config.max_model_len
        largest = max(layers, key=lambda layer: layer.space.bytes(1, longest, layer.heads.kv))
        return largest.space


def heads_of(config: VllmConfig, name: str, spec: CompressedSpec, device: torch.device) -> Heads:
    """The heads of a layer on this rank."""
    layer: Any = config.compilation_config.static_forward_context[name]
    kv, size, itemsize = spec.num_kv_heads, spec.head_size, spec.dtype.itemsize
    if layer.kv_cache_dtype in FP8:
        itemsize += layer.dtype.itemsize
    return Heads(kv, layer.num_heads // kv, size, itemsize, device.type)


def form_of(policy: Policy, bases: Bases, name: str, spec: CompressedSpec) -> LatentFormat:
    """How the latents of a layer lie in its blocks."""
    assert isinstance(policy, LatentPolicy)
    assert isinstance(spec.layout, LatentLayout)
    ranks = bases.ranks(extract_layer_index(name))
    return policy.form(*ranks, bases.bits, spec.layout.tokens)


def not_compressed(policy: Policy, name: str) -> CompressError:
    """Why a layer cannot be served: its blocks would be freed, but not compacted."""
    return CompressError(
        f"{name}: the policy {policy.name!r} neither scores tokens nor keeps latents; choose "
        "another policy"
    )
