# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a compressed layer, as vLLM's grouping and allocation see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from kv_policies.layout.base import Layout


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer that keeps ``layout.share`` of its blocks.

    Layers of one layout form one KV-cache group with one block table; layers of different layouts
    never do. Memory of the longest request is that of full attention: prefill holds every block.
    """

    layout: Layout

    @classmethod
    def of(cls, spec: FullAttentionSpec, layout: Layout) -> "CompressedSpec":
        """The same cache with a layout."""
        return replace_as(spec, cls, layout=layout)

    @classmethod
    def merge(cls, specs: Sequence[KVCacheSpec]) -> "CompressedSpec":
        """One spec for a group; AssertionError, which vLLM takes for "not one group", if they
        differ in their layouts."""
        layouts = {getattr(spec, "layout", None) for spec in specs}
        assert len(layouts) == 1 and None not in layouts, "layers of different keep levels"
        base = FullAttentionSpec.merge(list(specs))
        return replace_as(base, cls, layout=layouts.pop())

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Whether all layers of the model can share this layer's block table."""
        return all(
            isinstance(spec, CompressedSpec) and spec.layout == self.layout
            for spec in kv_cache_specs.values()
        )
