# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton attention with compressed layers, for CUDA."""

from typing import ClassVar

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_plugin.kv_cache.backend import CompressedBuilder, CompressedImpl, CustomBackend


class TritonBuilder(CompressedBuilder, TritonAttentionMetadataBuilder):
    # Metadata of drafts would be refreshed in place, with the raw table.
    supports_draft_decode_metadata_update: ClassVar[bool] = False


class TritonImpl(CompressedImpl, TritonAttentionImpl):
    pass


class TritonBackend(CustomBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonImpl]:
        return TritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonBuilder]:
        return TritonBuilder
