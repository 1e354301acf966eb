# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a compressed layer, as vLLM's grouping and allocation see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from kv_policies.layout.base import Layout


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer that keeps what ``layout`` says of its blocks.

    Layers of one layout form one KV-cache group with one block table. Layers of different layouts
    never share a group. The longest request takes as much memory as under full attention, because
    prefill holds every block.
    """

    layout: Layout

    @classmethod
    def of(cls, spec: FullAttentionSpec, layout: Layout) -> "CompressedSpec":
        """The same cache with a layout, in the blocks of that layout."""
        return replace_as(spec, cls, layout=layout, block_size=layout.block_size)

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
