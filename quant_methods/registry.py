# SPDX-License-Identifier: Apache-2.0
"""Methods by name: ours, and those that other packages register as entry points."""

from typing import Any, Final

from compress_common.errors import CompressError
from compress_common.registry import Registry
from quant_methods.base import QuantMethod
from quant_methods.methods.fireq import FireQ
from quant_methods.methods.rsq import RSQ
from quant_methods.methods.rtn import RoundToNearest
from quant_methods.methods.smoothquant_plus import SmoothQuantPlus

_REGISTRY: Final = Registry[QuantMethod](
    noun="method",
    group="vllm_compress.quant_methods",
    built_in=(SmoothQuantPlus, RoundToNearest, RSQ, FireQ),
)


def methods() -> dict[str, type[QuantMethod]]:
    """Return every registered method; CompressError when two claim one name."""
    return _REGISTRY.classes()


def served_methods() -> tuple[type[QuantMethod], ...]:
    """Return the methods that an engine knows: all, or ours where another package is broken.

    Such a package is an error for who names a method, not for an engine that uses none.
    """
    try:
        return tuple(methods().values())
    except CompressError:
        return _REGISTRY.built_in


def build_method(name: str, settings: dict[str, Any]) -> QuantMethod:
    """Return a method with validated settings; CompressError lists every bad key and value."""
    return _REGISTRY.build(name, settings)
