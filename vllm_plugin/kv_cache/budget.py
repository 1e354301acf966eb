# SPDX-License-Identifier: Apache-2.0
"""From the settings to one layout per layer."""

from fractions import Fraction
from typing import Any

from compress_common.errors import CompressError, joined
from kv_policies.bases import Bases
from kv_policies.latents import LatentFormat
from kv_policies.layout import Layout
from kv_policies.profile import load
from kv_policies.registry import policies
from quant_methods.architecture import architecture_of
from quant_methods.checkpoint import Checkpoint
from quant_methods.local import local_folder
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers, weights_digest
from vllm_plugin.settings import KVSettings


def layouts_of(settings: KVSettings, block_size: int, name: str, config: Any) -> dict[int, Layout]:
    """The layout of each full-attention layer, by its index in the model.

    name, config: as for ``fingerprint_of``. CompressError says what does not fit: a profile or
    bases of another model or budget, a policy without the file that it needs, a window that is not
    whole blocks.
    """
    model, layers = fingerprint_of(name, config), full_attention_layers(config)
    policy = policies().get(settings.policy)  # an unknown one is reported by ``settings.build``
    shares = dict.fromkeys(layers, settings.keep or Fraction(1))
    recent = 0
    if settings.latents:
        if settings.keep != 1:
            share = _share_of_latents(settings, block_size, name, config)
            shares = dict.fromkeys(layers, share)
        recent = settings.build().settings.recent
    elif settings.profile is not None:
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
            recent=-(-recent // block_size) * block_size,
        )
        for layer, share in shares.items()
    }


def bases_of(settings: KVSettings, name: str, config: Any) -> Bases:
    """The bases that ``settings`` name, checked against the model; parameters as above."""
    policy = settings.build()  # says what is wrong with its settings
    if settings.bases is None:
        raise CompressError(
            f"{settings.policy} needs bases of the model: make them with `vllm-compress "
            f"calibrate-kv {name} --ratio 0.8` and name the file as compress.kv.bases, or choose "
            "another policy"
        )
    model, layers = fingerprint_of(name, config), full_attention_layers(config)
    return Bases.load(policy.settings.bases, model, layers, _digest(name, config))


def _digest(name: str, config: Any) -> str | None:
    """Of a 16-bit checkpoint on this machine; None: nothing to compare with."""
    folder = local_folder(name)
    if folder is None or getattr(config, "quantization_config", None):
        return None
    try:
        arch = architecture_of(config)
        return weights_digest(Checkpoint(folder), arch.layers_prefix, config.num_hidden_layers)
    except CompressError:  # no weights there, as with --load-format dummy
        return None


def _share_of_latents(settings: KVSettings, block_size: int, name: str, config: Any) -> Fraction:
    """Blocks per block that is packed, the same for all layers."""
    bases = bases_of(settings, name, config)
    model, bits = fingerprint_of(name, config), settings.build().settings.bits
    problems = []
    if settings.keep is not None:
        problems.append(
            f"keep is given, but the bases {settings.bases} name their own ratio; leave keep out"
        )
    if settings.profile is not None:
        problems.append(f"{settings.policy} keeps the same of every layer; leave profile out")
    elements = block_size * 2 * model.num_key_value_heads * model.head_dim
    tokens = min(
        LatentFormat.most_tokens(elements, *bases.ranks(layer), bits) for layer in bases.layers
    )
    if tokens <= block_size and bases.ratio:
        problems.append(
            f"latents of {sum(bases.ranks(bases.layers[0]))} numbers save nothing in blocks of "
            f"{block_size} tokens: make bases with a larger --ratio, or set a larger --block-size"
        )
    if problems:
        raise joined(problems)
    return Fraction(block_size, max(tokens, block_size))
