# SPDX-License-Identifier: Apache-2.0
"""Make one layout per layer from the settings."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from compress_common.errors import CompressError, joined
from kv_policies.base import LatentPolicy
from kv_policies.budget.profile import load
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import split_problem
from kv_policies.latents.format import BLOCK, GROUP
from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.tokens import TokenLayout
from kv_policies.registry import policies
from vllm_plugin.compatibility import kv_model_problems
from vllm_plugin.kv_fingerprint import (
    fingerprint_of,
    full_attention_layers,
    published_weights,
)
from vllm_plugin.settings import KVSettings

_WINDOW: Final = 256  # generated tokens; enough for a choice among them to mean something


def layouts_of(
    settings: KVSettings, block_size: int, name: str, config: Any, ranks: int | None = None
) -> Mapping[int, Layout]:
    """Make the layout of each full-attention layer, by its index in the model.

    Args:
        settings: ``compress.kv``.
        block_size: tokens per block.
        name: for messages: a hub id or a folder.
        config: the text model's.
        ranks: of tensor parallelism, which bases are made for; None: any number.

    Raises:
        CompressError: the model cannot be compressed; the profile or the bases are of another
            model, budget or number of ranks; the policy lacks a file that it needs; a window is not
            whole blocks.
    """
    if problems := kv_model_problems(config, settings.capabilities):
        raise joined(problems)
    if settings.keeps_latents:
        return _latent_layouts(settings, block_size, name, config, ranks)
    model, layers = fingerprint_of(name, config), full_attention_layers(config)
    policy = policies().get(settings.policy)  # ``settings.build`` reports an unknown policy
    whole = Fraction(1)  # of a budget: what every layer gets without a profile
    shares = dict.fromkeys(layers, settings.keep or whole)
    if settings.profile is not None:
        exact = fingerprint_of(name, config, published_weights(name, config))
        profile = load(settings.profile, exact, layers)
        whole = profile.keep
        if settings.keep not in (None, profile.keep):
            raise CompressError(
                f"keep is {float(settings.keep)}, the profile {settings.profile} was made for "
                f"{float(profile.keep)}; leave keep out, or make a profile with `vllm-compress "
                f"profile {model.name} --keep {float(settings.keep)}`"
            )
        shares = dict(zip(layers, profile.cut(settings.levels).per_layer, strict=True))
    elif policy and policy.capabilities.needs_profile and settings.keep != 1:
        share = float(settings.keep or 0.25)  # of a budget, a profile tells only how layers differ
        raise CompressError(
            f"{settings.policy} takes each layer's share from a profile: make one with "
            f"`vllm-compress profile {model.name} --keep {share}` and name it "
            "as compress.kv.profile, or choose another policy"
        )
    window = settings.decode_window
    window = _whole(_WINDOW, block_size) if window is None else window
    if settings.budget is not None:
        cut = _whole(settings.prompt_window or 0, block_size)
        return _bounded_layouts(settings.budget, block_size, window, shares, whole, cut)
    return {
        layer: TokenLayout(
            block_size=block_size,
            keep=share,
            window=window,
            min_blocks=settings.min_blocks,
            min_prompt=_whole(settings.min_prompt, block_size),
        )
        for layer, share in shares.items()
    }


def _bounded_layouts(
    budget: int,
    block_size: int,
    window: int,
    shares: Mapping[int, Fraction],
    mean: Fraction,
    prompt_window: int,
) -> dict[int, Layout]:
    """The layouts of a budget, which a profile's shares scale: their mean is the budget."""
    smallest = min(shares.values()) / mean
    tokens = {
        layer: _whole(math.ceil(budget * share / mean), block_size)
        for layer, share in shares.items()
    }
    if (least := min(tokens.values())) < 2 * window:
        where = "" if smallest == 1 else f", {least} in the layer with the least,"
        advice = f"raise compress.kv.budget to {math.ceil(2 * window / smallest)}"
        if fitting := least // 2 // block_size * block_size:
            advice += f", or set compress.kv.decode_window to at most {fitting}"
        raise CompressError(
            f"a budget of {budget} tokens{where} is less than two decode windows of {window}; "
            f"{advice}"
        )
    if 0 < prompt_window <= (most := max(tokens.values())):
        raise CompressError(
            f"a prompt window of {prompt_window} tokens is not more than a layer's budget of "
            f"{most}; raise compress.kv.prompt_window to {most + block_size} or more, or remove it"
        )
    return {
        layer: BoundedLayout(block_size, each, window, prompt_window=prompt_window)
        for layer, each in tokens.items()
    }


def _whole(tokens: int, block_size: int) -> int:
    """Round up to whole blocks."""
    return -(-tokens // block_size) * block_size


def bases_of(settings: KVSettings, name: str, config: Any, ranks: int | None = None) -> Bases:
    """Load the bases that ``settings`` name and check them.

    Args:
        settings: ``compress.kv``.
        name: for messages: a hub id or a folder.
        config: the text model's.
        ranks: of tensor parallelism; None: not compared.

    Raises:
        CompressError: there are none, or they do not fit.
    """
    policy = settings.build()  # raises where its settings are wrong
    if settings.bases is None:
        raise CompressError(
            f"{settings.policy} needs bases of the model: make them with `vllm-compress "
            f"calibrate-kv {name}` and name the file as compress.kv.bases, or choose "
            "another policy"
        )
    model, layers = fingerprint_of(name, config), full_attention_layers(config)
    bases = Bases.load(policy.settings.bases, model, layers, published_weights(name, config))
    wanted = getattr(policy.settings, "bits", None)
    if wanted not in (None, bases.bits):
        raise CompressError(
            f"bits is {wanted}, but the bases {settings.bases} are made for latents of "
            f"{bases.bits} bits; leave bits out, or make bases with `vllm-compress calibrate-kv "
            f"{name} --bits {wanted}`"
        )
    if ranks not in (None, made := bases.header.tensor_parallel):
        advice = f"set it to {made}"
        if not split_problem(model.num_key_value_heads, ranks):
            advice += (
                f", or make bases with `vllm-compress calibrate-kv {name} --tensor-parallel-size "
                f"{ranks}`"
            )
        raise CompressError(
            f"--tensor-parallel-size is {ranks}, but the bases {settings.bases} are made for "
            f"{made}: a latent is of the KV heads of one rank; {advice}"
        )
    return bases


def _latent_layouts(
    settings: KVSettings, block_size: int, name: str, config: Any, ranks: int | None
) -> dict[int, LatentLayout]:
    bases, policy = bases_of(settings, name, config, ranks), settings.build()
    assert isinstance(policy, LatentPolicy)
    elements = block_size * 2 * bases.header.features
    # Ranks of a level fill blocks of ``BLOCK`` tokens alike. In larger blocks they can differ by a
    # few tokens, and each layout more is one more group of layers.
    forms = {layer: (*bases.ranks(layer), bases.bits) for layer in bases.layers}
    features = elements // block_size
    levels = {layer: policy.most_tokens(BLOCK * features, *form) for layer, form in forms.items()}
    tokens: dict[int, int] = {}
    for layer, level in levels.items():
        most = policy.most_tokens(elements, *forms[layer])
        tokens[level] = min(most, tokens.get(level, most))
    if bases.ratio and min(tokens.values()) <= block_size:
        most = max(sum(bases.ranks(layer)) for layer in bases.layers)
        raise CompressError(
            f"latents of {most} numbers in {bases.bits} bits save nothing in blocks of "
            f"{block_size} tokens: make bases with a larger --ratio, or set a larger --block-size"
        )
    unit = math.lcm(block_size, GROUP)
    return {
        layer: LatentLayout(
            block_size=block_size,
            tokens=per_block if (per_block := tokens[levels[layer]]) > block_size else 0,
            unit=unit,
            window=unit if settings.decode_window is None else settings.decode_window,
            min_prompt=_whole(settings.min_prompt, block_size),
            recent=_whole(policy.recent, block_size),
        )
        for layer in bases.layers
    }
