# SPDX-License-Identifier: Apache-2.0
"""Healers by name: ours, and those that other packages register as entry points."""

from typing import Any, Final

from compress_common.registry import Registry
from depth_pruning.healers.base import Healer
from depth_pruning.healers.fusegpt import FuseGPT
from depth_pruning.healers.linear import Linear
from depth_pruning.healers.none import NoHealer
from depth_pruning.healers.refit import Refit

_REGISTRY: Final = Registry[Healer](
    noun="healer",
    group="vllm_compress.depth_healers",
    built_in=(Refit, Linear, FuseGPT, NoHealer),
)


def healers() -> dict[str, type[Healer]]:
    """Return every registered healer; CompressError when two claim one name."""
    return _REGISTRY.classes()


def build_healer(name: str, settings: dict[str, Any]) -> Healer:
    """Return a healer with validated settings; CompressError lists every bad key and value."""
    return _REGISTRY.build(name, settings)
