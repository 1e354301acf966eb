# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a compressed layer, as vLLM's grouping and allocation see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from kv_policies.layout.base import Layout


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer that keeps what ``layout`` says of its blocks.

    Layers of one layout form one KV-cache group with one block table. Layers of different layouts
    never share a group.

    Attributes:
        layout: What is kept.
        most_blocks: That a request takes at a time; None: as many as under full attention, because
            prefill holds every block.
    """

    layout: Layout
    most_blocks: int | None = None

    @classmethod
    def of(
        cls, spec: FullAttentionSpec, layout: Layout, longest: int = 0, in_flight: int = 0
    ) -> "CompressedSpec":
        """The same cache with a layout, in the blocks of that layout.

        Args:
            spec: Of full attention.
            layout: What is kept.
            longest: Tokens of a request, at most.
            in_flight: Tokens of steps that have not settled, at most.
        """
        most = layout.most_columns(longest, in_flight)
        bounded = most < -(-longest // layout.block_size)
        return replace_as(
            spec,
            cls,
            layout=layout,
            block_size=layout.block_size,
            most_blocks=most if bounded else None,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request, which vLLM wants the pool to hold."""
        whole: int = super().max_memory_usage_bytes(vllm_config)
        if self.most_blocks is None:
            return whole
        return min(whole, self.most_blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: Sequence[KVCacheSpec]) -> "CompressedSpec":
        """One spec for a group of layers that are alike.

        Raises:
            AssertionError: If they are not, which vLLM takes for "not one group".
        """
        # vLLM's rule for any spec. That of full attention would make a spec without a layout.
        return super(FullAttentionSpec, cls).merge(specs)

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Whether all layers of the model can share this layer's block table."""
        return all(
            isinstance(spec, CompressedSpec) and spec.layout == self.layout
            for spec in kv_cache_specs.values()
        )
