# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with compressed layers."""

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_plugin.kv_cache.backend import CompressedBuilder, CompressedImpl


class CPUBuilder(CompressedBuilder, CPUAttentionMetadataBuilder):
    pass


class CPUImpl(CompressedImpl, CPUAttentionBackendImpl):
    pass


class CPUBackend(CPUAttentionBackend):
    """Takes the place of CPU_ATTN: on a CPU vLLM looks at no other name."""

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        return CPUBuilder
