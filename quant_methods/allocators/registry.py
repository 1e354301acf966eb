# SPDX-License-Identifier: Apache-2.0
"""Allocators by name: ours, and those that other packages register as entry points."""

from typing import Any, Final

from compress_common.registry import Registry
from quant_methods.allocators.baq import BAQ
from quant_methods.allocators.base import Allocator
from quant_methods.allocators.evopress import EvoPress
from quant_methods.allocators.hessian import Hessian
from quant_methods.allocators.luq import LUQ
from quant_methods.allocators.probe import KLProbe

_REGISTRY: Final = Registry[Allocator](
    noun="allocator",
    group="vllm_compress.allocators",
    built_in=(KLProbe, EvoPress, BAQ, LUQ, Hessian),
)


def allocators() -> dict[str, type[Allocator]]:
    """Return every registered allocator; CompressError when two claim one name."""
    return _REGISTRY.classes()


def build_allocator(name: str, settings: dict[str, Any]) -> Allocator:
    """Return an allocator with validated settings; CompressError lists every bad key and value."""
    return _REGISTRY.build(name, settings)
