# SPDX-License-Identifier: Apache-2.0
"""What is known of an engine's compression before its first request."""

from dataclasses import dataclass
from fractions import Fraction

from vllm.config import VllmConfig

from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers
from vllm_plugin.quantization.config import SmoothQuantPlusConfig
from vllm_plugin.settings import parse_settings

NONE = "none"


@dataclass(frozen=True)
class Facts:
    """policy and info: values of labels. gauges: values by metric and label."""

    policy: str
    info: dict[str, str]
    gauges: dict[tuple[str, str], float]


def compresses(config: VllmConfig) -> bool:
    """Whether the plugin does anything in this engine."""
    settings = parse_settings(config.additional_config)
    return settings.kv is not None or isinstance(config.quant_config, SmoothQuantPlusConfig)


def facts_of(config: VllmConfig) -> Facts:
    """The facts of an engine that compresses something."""
    settings = parse_settings(config.additional_config).kv
    model = config.model_config
    method = getattr(config.quant_config, "method", NONE)
    info = dict.fromkeys(("policy", "keep", "levels", "decode_window", "profile"), NONE)
    gauges: dict[tuple[str, str], float] = {("kv_kept_ratio", ""): 1.0, ("kv_saved_bytes", ""): 0.0}
    if settings is not None:
        layouts = layouts_of(
            settings,
            config.cache_config.block_size,
            fingerprint_of(model.model, model.hf_text_config),
            full_attention_layers(model.hf_text_config),
        )
        shares = [layout.keep for layout in layouts.values()]
        info |= {
            "policy": settings.policy,
            "keep": f"{float(sum(shares, Fraction(0)) / len(shares)):.4g}",
            "levels": str(len(set(shares))),
            "decode_window": str(settings.decode_window),
            "profile": settings.profile.name if settings.profile else NONE,
        }
    return Facts(info["policy"], info | {"method": method}, gauges)
