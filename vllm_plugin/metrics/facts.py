# SPDX-License-Identifier: Apache-2.0
"""Figures of an engine's compression that are known before its first request."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from vllm.config import VllmConfig
from vllm.logger import init_logger

from compress_common.structure.wrapper import language_config
from vllm_plugin.capacity.footprint import Footprint, kv_footprint
from vllm_plugin.diffusion.support import diffusion_of
from vllm_plugin.metrics.catalogue import BY_NAME
from vllm_plugin.self_check import layouts, weights_of
from vllm_plugin.settings import KVSettings, Settings, parse_settings

logger = init_logger(f"vllm.{__name__}")
NONE = "none"


@dataclass(frozen=True)
class Facts:
    """Figures of one engine.

    Attributes:
        info: values of the labels of the metric ``info``.
        gauges: values by metric and label.
    """

    info: dict[str, str]
    gauges: dict[tuple[str, str], float]


def facts_of(config: VllmConfig) -> Facts:
    """Collect the facts of an engine that compresses something, or denoises.

    A figure that is not known (a cache of unknown size, weights that are not safetensors) has no
    metric. Nothing is raised for it.
    """
    settings = parse_settings(config.additional_config)
    info = {label: NONE for label in BY_NAME["info"].labels if label != "version"}
    info["method"] = getattr(config.quant_config, "method", NONE)
    gauges = {("kv_kept_ratio", ""): 1.0}
    idle = ("kv_saved_bytes", "kv_saved_bytes_peak", "kv_live_tokens_max")
    gauges |= {(name, ""): 0.0 for name in idle}
    if weights := weights_of(config, settings):
        gauges |= _both("weight_bytes", weights)
    try:
        gauges |= _both("kv_bytes_per_token", _kv_bytes(config, settings))
    except Exception as error:
        logger.debug("bytes of the KV cache are not known: %s", error)
    if denoised := diffusion_of(config):
        info["policy"] = denoised.policy
    elif settings.kv is not None:
        info |= _kv_info(config, settings, settings.kv)
    return Facts(info, gauges)


def _kv_bytes(config: VllmConfig, settings: Settings) -> Footprint:
    model, cache = config.model_config, config.cache_config.cache_dtype
    chosen = layouts(config, settings)
    text = language_config(model.hf_config)
    return kv_footprint(text, model.dtype, cache, chosen, model.max_model_len)


def _kv_info(config: VllmConfig, settings: Settings, kv: KVSettings) -> dict[str, str]:
    file = kv.profile or kv.bases
    info = {"policy": kv.policy, "profile": Path(file).name if file else NONE}
    try:
        chosen = layouts(config, settings) or {}
    except Exception as error:  # for instance a file that is gone since the engine read it
        logger.debug("the layout of the KV cache is not known: %s", error)
        return info
    kept = list(chosen.values())
    mean = sum((layout.share for layout in kept), Fraction(0)) / len(kept)
    return info | {
        "keep": NONE if kv.budget else f"{float(mean):.4g}",
        "budget": str(kv.budget) if kv.budget else NONE,
        "prompt_window": str(kv.prompt_window) if kv.prompt_window else NONE,
        "levels": str(len(set(map(str, kept)))),
        "decode_window": str(next(iter(chosen.values())).window),
    }


def _both(name: str, footprint: Footprint) -> dict[tuple[str, str], float]:
    return {
        (name, "original"): float(footprint.original),
        (name, "compressed"): float(footprint.compressed),
    }
