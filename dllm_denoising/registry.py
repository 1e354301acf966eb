# SPDX-License-Identifier: Apache-2.0
"""Cache policies by name: built-in ones, and those of other packages by entry point."""

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
    """Return all registered policies by name.

    Raises:
        CompressError: If two policies have the same name.
    """
    return POLICIES.classes()


def build_policy(name: str, settings: dict[str, Any]) -> CachePolicy:
    """Return a policy with validated settings.

    Raises:
        CompressError: If there are bad keys or values. It lists all of them.
    """
    return POLICIES.build(name, settings)
