# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention (3 on Hopper, 2 on Ampere and Ada) with compressed layers, for CUDA."""

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_plugin.kv_cache.backend import CompressedBuilder, CompressedImpl, CustomBackend


class FlashBuilder(CompressedBuilder, FlashAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Metadata of drafts would be refreshed in place, with the raw table.
        self.supports_draft_decode_metadata_update = False


class FlashImpl(CompressedImpl, FlashAttentionImpl):
    pass


class FlashBackend(CustomBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        return FlashBuilder
