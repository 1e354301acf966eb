# SPDX-License-Identifier: Apache-2.0
"""The input of each layer for every position, in the blocks of the KV cache.

A refresh that starts in the middle of the layers needs what went into the first of them. As a layer
with a cache of its own, of one vector per token, vLLM allocates it and counts its bytes with keys
and values, and one block table serves both.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec


class HiddenBuilder(AttentionMetadataBuilder):
    """There is no attention to describe."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> None:
        return None


class HiddenBackend(AttentionBackend):
    """Storage without a kernel."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "COMPRESS_HIDDEN"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("no layer attends with it")

    @staticmethod
    def get_builder_cls() -> type[HiddenBuilder]:
        return HiddenBuilder


class HiddenCache(torch.nn.Module, AttentionLayerBase):
    """One vector of ``size`` per position. prefix: the layer's name."""

    def __init__(self, vllm_config: VllmConfig, size: int, prefix: str) -> None:
        super().__init__()
        self.size, self.dtype = size, vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=self.size,
            dtype=self.dtype,
            non_causal=True,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return HiddenBackend

    @property
    def _flat(self) -> torch.Tensor:
        return self.kv_cache.view(-1, self.size)

    def write(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """x [T, size] to slots, int64 [T]."""
        self._flat[slots] = x

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """[T, size] of slots, int64 [T]."""
        return self._flat[slots]
