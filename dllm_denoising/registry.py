# SPDX-License-Identifier: Apache-2.0
"""Cache policies by name: ours, and third parties' through an entry-point group."""

from typing import Any, Final

from compress_common.registry import Registry
from dllm_denoising.base import CachePolicy
from dllm_denoising.dual_cache import DualCache
from dllm_denoising.elastic import Elastic
from dllm_denoising.fixed_period import FixedPeriod
from dllm_denoising.full import Full
from dllm_denoising.never import Never

POLICIES: Final = Registry[CachePolicy](
    noun="diffusion cache policy",
    group="vllm_compress.diffusion_policies",
    built_in=(Full, Never, FixedPeriod, DualCache, Elastic),
)


def policies() -> dict[str, type[CachePolicy]]:
    """Every registered policy; CompressError when two claim one name."""
    return POLICIES.classes()


def build_policy(name: str, settings: dict[str, Any]) -> CachePolicy:
    """A policy with validated settings; CompressError lists every bad key and value at once."""
    return POLICIES.build(name, settings)
