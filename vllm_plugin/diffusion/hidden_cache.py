# SPDX-License-Identifier: Apache-2.0
"""The input of each layer for each position, in the blocks of the KV cache.

A refresh that starts at some layer needs the inputs of that layer for all positions. To vLLM, they
are the cache of a layer of its own, with one vector per token. vLLM therefore allocates them,
counts their bytes with keys and values, and uses one block table for both.
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
    """Builds no metadata, because this layer has no attention."""

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
    """A backend that only stores."""

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
    """One vector per position."""

    def __init__(self, vllm_config: VllmConfig, size: int, prefix: str) -> None:
        """Register the layer.

        Args:
            vllm_config: The config of the engine.
            size: Elements of a vector.
            prefix: The name of the layer.
        """
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
        """Write x [T, size] to slots, int64 [T]."""
        self._flat[slots] = x

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the vectors [T, size] of slots, int64 [T]."""
        return self._flat[slots]
