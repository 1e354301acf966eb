# SPDX-License-Identifier: Apache-2.0
"""What is known of an engine's compression before its first request."""

from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from vllm.config import VllmConfig

from compress_common.errors import CompressError
from vllm_plugin.capacity import Footprint, kv_footprint
from vllm_plugin.diffusion.support import diffusion_of
from vllm_plugin.self_check import layouts, weights_of
from vllm_plugin.settings import parse_settings

NONE = "none"


@dataclass(frozen=True)
class Facts:
    """info: values of its labels. gauges: values by metric and label."""

    info: dict[str, str]
    gauges: dict[tuple[str, str], float]


def facts_of(config: VllmConfig) -> Facts:
    """The facts of an engine that compresses something, or denoises."""
    settings = parse_settings(config.additional_config)
    model, kv = config.model_config, settings.kv
    info = dict.fromkeys(("policy", "keep", "levels", "decode_window", "profile"), NONE)
    info["method"] = getattr(config.quant_config, "method", NONE)
    chosen = layouts(config, settings)
    gauges = {("kv_kept_ratio", ""): 1.0, ("kv_saved_bytes", ""): 0.0}
    text, cache = model.hf_text_config, config.cache_config.cache_dtype
    with suppress(CompressError):  # caches that are not ours to compress, and of no known size
        gauges |= _both("kv_bytes_per_token", kv_footprint(text, model.dtype, cache, chosen))
    if weights := weights_of(config, settings):
        gauges |= _both("weight_bytes", weights)
    if denoised := diffusion_of(config):
        info["policy"] = denoised.policy
    if kv is not None and chosen:
        file = kv.profile or kv.bases
        shares = [layout.share for layout in chosen.values()]
        info |= {
            "policy": kv.policy,
            "keep": f"{float(sum(shares, Fraction(0)) / len(shares)):.4g}",
            "levels": str(len(set(shares))),
            "decode_window": str(next(iter(chosen.values())).window),
            "profile": Path(file).name if file else NONE,
        }
    return Facts(info, gauges)


def _both(name: str, footprint: Footprint) -> dict[tuple[str, str], float]:
    return {
        (name, "original"): float(footprint.original),
        (name, "compressed"): float(footprint.compressed),
    }
