# SPDX-License-Identifier: Apache-2.0
"""Profiles: how much of the KV cache each layer of a model needs, measured with transformers.

No vLLM engine is started; any decoder whose attention ``attention_capture`` reaches will do.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress_common.errors import CompressError
from kv_policies.budget.levels import fractions_of, quantise, retained, rounded, uniform
from kv_policies.budget.profile import Profile, Provenance
from quant_methods.base import Progress, silent
from quant_methods.calibration import CalibrationSettings, calibration_tokens
from quant_methods.checkpoint import Checkpoint, resolve
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, attention_of, register
from vllm_plugin.commands.profiling.hf_model import layers_to_fit, loaded, origin, usable
from vllm_plugin.kv_fingerprint import fingerprint_of


def make_profile(
    model: str,
    keep: Fraction,
    text: CalibrationSettings,
    *,
    levels: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Profile, list[torch.Tensor]]:
    """The profile of a model folder or hub id, and the attention it comes from.

    PrefixKV's offline mode (https://arxiv.org/abs/2412.03409): attention that each token receives
    from all later queries, water-filled per sample, averaged over ``text``'s samples. Only layers
    with full attention are in it.

    levels: None for the number that suits the model. device: where the model runs, in its
    checkpoint's dtype. Returned attention: float32 [layers of the profile, tokens] per sample.
    CompressError when the model cannot be profiled or the text is missing or too short.
    """
    if keep * text.length < 1:
        raise CompressError(
            f"keep {keep} of {text.length} tokens is less than one token; raise the length to at "
            f"least {math.ceil(1 / keep)}"
        )
    folder = resolve(model)
    name = folder.resolve().name if Path(model).expanduser().is_dir() else model
    Checkpoint(folder)  # says what is wrong with the files
    config = loaded(AutoConfig, folder, name)
    decoder = config.get_text_config()
    layers = layers_to_fit(name, config)
    fingerprint = fingerprint_of(name, decoder)
    chosen = quantise(uniform(len(layers), keep), levels)  # a bad number is told before the work

    progress("load model", 0, 1)
    place = usable(device)
    register()
    network = loaded(
        AutoModelForCausalLM, folder, name, dtype="auto", attn_implementation=ATTENTION
    )
    network = network.eval().to(place)
    tokenizer = loaded(AutoTokenizer, folder, name)
    attention_of(network, torch.zeros(1, 2, dtype=torch.int64), layers)  # refuses before the work
    tokens = calibration_tokens(text, network, tokenizer, progress)
    samples = []
    for number, row in enumerate(tokens):
        progress("profile", number, len(tokens))
        samples.append(attention_of(network, row[None], layers))
    progress("profile", len(tokens), len(tokens))

    fractions = rounded(fractions_of(samples, keep))
    cut = quantise(fractions, len(chosen.fractions))
    shares = {"profile": fractions, "levels": cut.per_layer, "uniform": uniform(len(layers), keep)}
    provenance = Provenance(
        **origin(text),
        samples=len(samples),
        attention_retained={
            kind: round(fmean(kept_by_layer(samples, values)), 6) for kind, values in shares.items()
        },
    )
    profile = Profile(
        model=fingerprint,
        keep=keep,
        levels=len(cut.fractions),
        layers=layers,
        fractions=tuple(fractions),
        provenance=provenance,
    )
    return profile, samples


def kept_by_layer(samples: Sequence[torch.Tensor], fractions: Sequence[Fraction]) -> list[float]:
    """Share of its attention that each layer keeps, mean over samples [layers, tokens], 0 to 1."""
    return [
        fmean(retained(sample[row : row + 1], [fraction]) for sample in samples)
        for row, fraction in enumerate(fractions)
    ]
