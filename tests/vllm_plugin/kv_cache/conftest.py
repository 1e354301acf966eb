# SPDX-License-Identifier: Apache-2.0
"""A profile and bases without a calibration run: what is kept does not matter to the mechanics."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from benchmarks.kv_engine import save_made_up_bases
from compress_common.checkpoints.checkpoint import Checkpoint
from kv_policies.budget.profile import Profile, Provenance
from kv_policies.latents.bases_header import SIDES, Side, even_ranks
from kv_policies.latents.format import Bits
from kv_policies.latents.low_rank import Factor, svd
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers


def save_profile(model: Path, path: Path, keep: Fraction, levels: int) -> Path:
    """Shares from half of ``keep`` in the first layers to one and a half of it in the last."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    layers = full_attention_layers(config)
    count = len(layers)
    fractions = [keep / 2 + keep * Fraction(at, count - 1) for at in range(count)]
    Profile(
        model=fingerprint_of("test", config),
        keep=keep,
        levels=levels,
        layers=layers,
        fractions=tuple(fractions),
        provenance=Provenance(
            tool_version="test", created="2026-11-25", text="none", samples=1, sample_tokens=1
        ),
    ).save(path)
    return path


def save_bases(
    model: Path,
    path: Path,
    ratio: Fraction,
    totals: Sequence[int] = (),
    bits: Bits = 16,
    ranks: int = 1,
) -> Path:
    """The SVD of each projection, which needs no text.

    totals: numbers per token and rank of layers 0, 1, .., over and over; none: the ratio's in all.
    ranks: of tensor parallelism, which have bases of their own KV heads.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    layers = full_attention_layers(config)
    fingerprint = fingerprint_of("test", config)
    features = fingerprint.num_key_value_heads * fingerprint.head_dim // ranks
    totals = totals or (sum(even_ranks(ratio, features, bits)),)
    places: dict[str, tuple[int, Side]] = {
        f"model.layers.{layer}.self_attn.{side[0]}_proj.weight": (layer, side)
        for layer in layers
        for side in SIDES
    }
    shards: list[dict[tuple[int, Side], Factor]] = [{} for _ in range(ranks)]
    for name, tensor in Checkpoint(model).tensors(places):
        layer, side = places[name]
        weight, total = tensor.double().T, totals[layer % len(totals)]
        rank = total // 2 if side == "key" else total - total // 2
        for shard, part in zip(shards, weight.split(features, 1), strict=True):
            shard[layer, side] = svd(part, torch.zeros_like(part[0])).cut(rank).float()
    save_made_up_bases(model, ratio, bits, shards, path)
    return path


def save_low_rank(source: Path, path: Path) -> Path:
    """The model with key and value projections cut to half their rank."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer in model.model.layers:
        for side in SIDES:
            projection = getattr(layer.self_attn, f"{side[0]}_proj")
            weight = projection.weight.data.double().T
            factor = svd(weight, torch.zeros_like(weight[0])).cut(weight.shape[1] // 2)
            projection.weight.data = (weight @ factor.encode @ factor.decode).T.float()
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bases(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratio 0.8 in three levels, for the demo model: 224, 160 and 128 tokens to a block of 32."""
    path = tmp_path_factory.mktemp("bases") / "kv.safetensors"
    return save_bases(demo_model, path, Fraction(4, 5), (54, 76, 96))


@pytest.fixture(scope="session")
def profile(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep 0.25 in three levels, for the demo model."""
    path = tmp_path_factory.mktemp("profile") / "kv.json"
    return save_profile(demo_model, path, Fraction(1, 4), 3)
