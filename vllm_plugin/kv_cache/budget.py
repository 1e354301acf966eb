# SPDX-License-Identifier: Apache-2.0
"""From the settings to one layout per layer."""

from fractions import Fraction
from typing import Any

from compress_common.errors import CompressError
from kv_policies.layout import Layout
from kv_policies.profile import load
from kv_policies.registry import policies
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers
from vllm_plugin.settings import KVSettings


def layouts_of(settings: KVSettings, block_size: int, name: str, config: Any) -> dict[int, Layout]:
    """The layout of each full-attention layer, by its index in the model.

    name, config: as for ``fingerprint_of``. CompressError says what does not fit: a profile of
    another model or budget, a policy without the profile that it needs, a window that is not whole
    blocks.
    """
    model, layers = fingerprint_of(name, config), full_attention_layers(config)
    policy = policies().get(settings.policy)  # an unknown one is reported by ``settings.build``
    shares = dict.fromkeys(layers, settings.keep or Fraction(1))
    if settings.profile is not None:
        profile = load(settings.profile, model, layers)
        if settings.keep not in (None, profile.keep):
            raise CompressError(
                f"keep is {float(settings.keep)}, the profile {settings.profile} was made for "
                f"{float(profile.keep)}; leave keep out, or make a profile with `vllm-compress "
                f"profile {model.name} --keep {float(settings.keep)}`"
            )
        shares = dict(zip(layers, profile.cut(settings.levels).per_layer, strict=True))
    elif policy and policy.capabilities.needs_profile and settings.keep != 1:
        raise CompressError(
            f"{settings.policy} takes each layer's share from a profile: make one with "
            f"`vllm-compress profile {model.name} --keep {float(settings.keep or 0)}` and name it "
            "as compress.kv.profile, or choose another policy"
        )
    return {
        layer: Layout(
            block_size=block_size,
            keep=share,
            window=settings.decode_window,
            min_blocks=settings.min_blocks,
            min_prompt=-(-settings.min_prompt // block_size) * block_size,
        )
        for layer, share in shares.items()
    }
