# SPDX-License-Identifier: Apache-2.0
"""Factors of a block whose KV heads are split over ranks of tensor parallelism."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from kv_policies.latents.bases_header import SIDES, Objective, Side
from kv_policies.latents.format import GROUP, Bits
from kv_policies.latents.low_rank import closed_form, key_metric, moments, value_metric
from kv_policies.latents.rounding import losses, mean_losses, rounding_error, spread
from vllm_plugin.commands.profiling.block_factors import BlockFactor

KV_HEADS, SIZE, HIDDEN = 4, 4, 24
F = KV_HEADS * SIZE
SEEDS = st.integers(0, 999)
OBJECTIVES: tuple[Objective, ...] = ("attention", "reconstruction")
BITS: tuple[Bits, ...] = (4, 16)


def block(seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Attention of two query heads per KV head, inputs [2, 4 * GROUP, HIDDEN], token weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=SIZE,
    )
    attention = LlamaAttention(config, 0).float().requires_grad_(False)
    inputs = torch.randn(2, 4 * GROUP, HIDDEN) * 0.8 ** torch.arange(HIDDEN)
    return attention, inputs, torch.rand(8 * GROUP, dtype=torch.float64)


@given(SEEDS, st.sampled_from(SIDES), st.sampled_from(OBJECTIVES), st.sampled_from(BITS))
@settings(deadline=None, max_examples=25)
def test_one_shard_is_the_closed_form_of_all_heads_bit_for_bit(
    seed: int, side: Side, objective: Objective, bits: Bits
) -> None:
    attention, inputs, weights = block(seed)
    found = BlockFactor(attention, side, inputs, weights, objective, bits)
    flat, metric = inputs.flatten(0, 1), None
    states = (attention.k_proj if side == "key" else attention.v_proj)(flat).double()
    if objective == "attention" and side == "key":
        queries = attention.q_proj(flat).double().square().mean(0)
        metric = key_metric(queries, KV_HEADS, SIZE)
    elif objective == "attention":
        metric = value_metric(attention.o_proj.weight, KV_HEADS, SIZE)
    full, energies = closed_form(*moments(states, weights), metric)
    errors = {}
    for rank in (1, 4, 8, 16):
        expected = full.cut(rank)
        if bits == 4:
            expected = spread(expected, energies[:rank])
            errors[rank] = rounding_error(expected, states, side, metric, weights)
        (factor,) = found.factors(rank)
        for part, tensor in vars(expected).items():
            assert torch.equal(getattr(factor, part), tensor)
    assert torch.equal(found.losses, losses(energies, errors))


@given(SEEDS, st.sampled_from(SIDES), st.sampled_from(OBJECTIVES), st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=25)
def test_shards_know_their_own_heads_alone(
    seed: int, side: Side, objective: Objective, shards: int
) -> None:
    """What is told to be lost is lost, and not less than by bases of all heads."""
    attention, inputs, weights = block(seed)
    split, whole = (
        BlockFactor(attention, side, inputs, weights, objective, 16, count) for count in (shards, 1)
    )
    assert len(split.losses) == F // shards + 1
    assert float(split.losses[0]) == pytest.approx(1) and abs(float(split.losses[-1])) < 1e-9
    for rank in range(1, F // shards):
        factors = split.factors(rank)
        assert [tuple(factor.encode.shape) for factor in factors] == [(F // shards, rank)] * shards
        lost = split.errors(inputs, weights, rank)["closed_form"]
        assert lost == pytest.approx(float(split.losses[rank]), rel=1e-4)
        assert lost > float(whole.losses[shards * rank]) - 1e-9
    # Another key or value of the last head changes the factor of its shard, and no other.
    projection = attention.k_proj if side == "key" else attention.v_proj
    projection.weight[-1] *= 2
    changed = BlockFactor(attention, side, inputs, weights, "reconstruction", 16, shards)
    projection.weight[-1] /= 2
    before = BlockFactor(attention, side, inputs, weights, "reconstruction", 16, shards)
    same = [
        torch.equal(a.encode, b.encode)
        for a, b in zip(changed.factors(1), before.factors(1), strict=True)
    ]
    assert same == [True] * (shards - 1) + [False]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), SEEDS)
def test_shards_without_energy_lose_nothing(whole: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    energies = [
        torch.rand(3, generator=generator, dtype=torch.float64).sort(descending=True).values * each
        for each in [*whole, 1.0]
    ]
    found = mean_losses([losses(energy, {}) for energy in energies], energies)
    left = sum(energy.flip(0).cumsum(0).flip(0) for energy in energies)
    expected = torch.cat((left / left[0], left.new_zeros(1)))
    torch.testing.assert_close(found, expected)
