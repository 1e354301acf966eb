# SPDX-License-Identifier: Apache-2.0
"""Methods by name: ours, and third parties' through an entry-point group."""

from typing import Any, Final

from compress_common.registry import Registry
from quant_methods.base import QuantMethod
from quant_methods.rtn import RoundToNearest
from quant_methods.smoothquant_plus import SmoothQuantPlus

_REGISTRY: Final = Registry[QuantMethod](
    noun="method",
    group="vllm_compress.quant_methods",
    built_in=(SmoothQuantPlus, RoundToNearest),
)


def methods() -> dict[str, type[QuantMethod]]:
    """Every registered method; CompressError when two claim one name."""
    return _REGISTRY.classes()


def build_method(name: str, settings: dict[str, Any]) -> QuantMethod:
    """The method with validated settings; CompressError lists every bad key and value at once."""
    return _REGISTRY.build(name, settings)
