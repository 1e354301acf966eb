# SPDX-License-Identifier: Apache-2.0
"""Measures how much of the KV cache each layer of a model needs, with transformers.

No vLLM engine is started. Every decoder whose attention ``attention_capture`` reaches will do.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean

import torch

from compress_common.calibration.precision import computed_in
from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from kv_policies.budget.levels import fractions_of, quantize, retained, rounded, uniform
from kv_policies.budget.profile import Profile, Provenance
from quant_methods.calibration.images import ImageSettings
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, attention_of, register
from vllm_plugin.commands.profiling.hf_images import HFImageModel
from vllm_plugin.commands.profiling.hf_model import HFModel


def make_profile(
    model: str,
    keep: Fraction,
    samples: CalibrationSettings | ImageSettings,
    *,
    levels: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Profile, list[torch.Tensor]]:
    """Measure the profile of a model.

    This is PrefixKV's offline mode (https://arxiv.org/abs/2412.03409). The attention that each
    token receives from all later queries is water-filled per sample and averaged over the samples.
    Only layers with full attention are in the profile.

    Args:
        model: A model folder or hub id.
        keep: Mean share of the tokens that layers keep, in (0, 1].
        samples: The calibration text, or chats with images.
        levels: Number of different shares to serve, 1 to 8; None: what suits the model.
        device: Where the model runs, in its checkpoint's dtype: a name, or "auto".
        progress: Told as the work advances.

    Returns:
        The profile, and the attention it comes from: float32 [layers, tokens] for each sample.

    Raises:
        CompressError: The model cannot be profiled, or the samples are missing or too short.
    """
    if isinstance(samples, ImageSettings):
        subject: HFModel = HFImageModel(model, samples, math.ceil(1 / keep))
    elif keep * samples.length < 1:
        raise CompressError(
            f"keep {keep} of {samples.length} tokens is less than one token; raise the length to "
            f"at least {math.ceil(1 / keep)}"
        )
    else:
        subject = HFModel(model, samples)
    layers = subject.layers
    chosen = quantize(uniform(len(layers), keep), levels)  # refuses a bad number before the work
    place = subject.placement(device, whole=True)
    register()
    network = subject.network(progress, place.model, attn_implementation=ATTENTION)
    network.to(computed_in(subject.checkpoint.weight_bytes, place.device))
    # Refuses before the work.
    attention_of(network, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, layers)
    inputs, received = subject.inputs(network, progress), []
    for number, given in enumerate(inputs):
        progress("profile", number, len(inputs))
        received.append(attention_of(network, given, layers))
    progress("profile", len(inputs), len(inputs))

    fractions = rounded(fractions_of(received, keep))
    cut = quantize(fractions, len(chosen.fractions))
    shares = {"profile": fractions, "levels": cut.per_layer, "uniform": uniform(len(layers), keep)}
    provenance = Provenance(
        **subject.origin(),
        samples=len(received),
        attention_retained={
            kind: round(fmean(kept_by_layer(received, values)), 6)
            for kind, values in shares.items()
        },
    )
    profile = Profile(
        model=subject.fingerprint,
        keep=keep,
        levels=len(cut.fractions),
        layers=layers,
        fractions=tuple(fractions),
        provenance=provenance,
    )
    return profile, received


def kept_by_layer(samples: Sequence[torch.Tensor], fractions: Sequence[Fraction]) -> list[float]:
    """Return the share of its attention that each layer keeps, 0 to 1, mean over the samples.

    Args:
        samples: Attention that tokens receive, [layers, tokens] each.
        fractions: Share of the tokens that each layer keeps.
    """
    return [
        fmean(retained(sample[row : row + 1], [fraction]) for sample in samples)
        for row, fraction in enumerate(fractions)
    ]
