# SPDX-License-Identifier: Apache-2.0
"""Searches by name: ours, and those that other packages register as entry points."""

from typing import Any, Final

from compress_common.registry import Registry
from depth_pruning.searches.auto import Auto
from depth_pruning.searches.base import Search
from depth_pruning.searches.block_influence import BlockInfluence
from depth_pruning.searches.evopress import EvoPress
from depth_pruning.searches.greedy import Greedy
from depth_pruning.searches.macro_influence import MacroInfluence
from depth_pruning.searches.single_drop import SingleDrop
from depth_pruning.searches.window import Window

_REGISTRY: Final = Registry[Search](
    noun="search",
    group="vllm_compress.depth_searches",
    built_in=(Auto, SingleDrop, BlockInfluence, MacroInfluence, Window, Greedy, EvoPress),
)


def searches() -> dict[str, type[Search]]:
    """Return every registered search; CompressError when two claim one name."""
    return _REGISTRY.classes()


def build_search(name: str, settings: dict[str, Any]) -> Search:
    """Return a search with validated settings; CompressError lists every bad key and value."""
    return _REGISTRY.build(name, settings)
