# SPDX-License-Identifier: Apache-2.0
"""The two measurements of ``benchmarks.depth_routing``, on tiny random models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.depth_routing import (
    KINDS,
    WAYS,
    Orders,
    Sizes,
    choices,
    measured,
    repeating,
    without,
)
from benchmarks.depth_sharing import corrections, low_rank
from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import load_model
from compress_common.structure.derive import structure_of

DEPTH = 6


@pytest.fixture
def blocks(tiny_model: Callable[..., Path]) -> Blocks:
    checkpoint = Checkpoint(tiny_model("llama", num_hidden_layers=DEPTH))
    model = load_model(checkpoint, torch.float32)
    tokens = torch.randint(0, 1000, (4, 16), generator=torch.Generator().manual_seed(0))
    return Blocks(model, structure_of(checkpoint.hf_config), tokens)


def test_an_order_is_measured_as_the_model_runs_it(blocks: Blocks) -> None:
    orders, model = Orders(blocks), blocks.model
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        original = model(blocks.tokens).logits.log_softmax(-1)
        layers = model.model.layers
        for order in (without(DEPTH, 2, 4), repeating(DEPTH, 3), without(DEPTH, DEPTH - 1)):
            model.model.layers = torch.nn.ModuleList([layers[index] for index in order])
            model.config.num_hidden_layers = len(order)
            changed = model(blocks.tokens, use_cache=False).logits.log_softmax(-1)
            model.model.layers = layers
            kl = (original.exp() * (original - changed)).sum(-1)
            halves = torch.stack([kl[:, :8].mean(1), kl[:, 8:].mean(1)], 1)
            assert halves.min() > 1e-5
            torch.testing.assert_close(orders.divergence(order), halves, rtol=1e-3, atol=1e-6)
    assert orders.divergence(tuple(range(DEPTH))).abs().max() < 1e-6


def test_the_oracle_loses_least(blocks: Blocks) -> None:
    found = measured(blocks, ["a", "a", "b", "b"], Sizes(paired=3))
    assert tuple(found) == KINDS
    for ways in found.values():
        assert tuple(ways) == WAYS
        for losses in ways.values():
            assert losses.shape == (4,) and torch.all(losses >= ways["oracle"])
    assert torch.all(found["skip_or_repeat"]["oracle"] <= found["skip_one"]["oracle"])


def test_who_chooses() -> None:
    """Three candidates, four prompts of two domains. Halves differ on the last prompt alone."""
    whole = torch.tensor([[1.0, 1.0, 9.0, 9.0], [9.0, 9.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    losses = torch.stack([whole, whole], -1)
    losses[2, 3] = torch.tensor([0.0, 6.0])
    found = choices(losses, ["a", "a", "b", "b"])
    assert found["fixed"].tolist() == [3.0, 3.0, 3.0, 6.0]
    assert found["domain"].tolist() == [1.0, 1.0, 1.0, 2.0]
    assert found["prompt"].tolist() == [1.0, 1.0, 1.0, 6.0]
    assert found["oracle"].tolist() == [1.0, 1.0, 1.0, 2.0]


def test_sharing_with_the_full_rank_changes_nothing(blocks: Blocks) -> None:
    with torch.no_grad():
        before = blocks.model(blocks.tokens).logits
        found = corrections(blocks, 512)
        assert len(found) == DEPTH * len(blocks.structure.layer(0).names)
        for each in found:
            each.linear.weight.data = each.mean + each.up @ each.down
        torch.testing.assert_close(blocks.model(blocks.tokens).logits, before, rtol=0, atol=1e-3)
        for each in found:
            each.apply(8)
        assert sum(each.saved(8) for each in found) > 0
        assert (blocks.model(blocks.tokens).logits - before).abs().max() > 1e-3
        for each in found:
            each.apply(64)  # a correction of that size saves nothing
        assert not sum(each.saved(64) for each in found)
        assert torch.equal(blocks.model(blocks.tokens).logits, before)


def test_the_correction_suits_the_inputs() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 32, generator=draw) * torch.logspace(0, -2, 32)
    weight = torch.randn(16, 32, generator=draw)
    up, down = low_rank(weight, inputs.t() @ inputs / len(inputs), 4)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = left[:, :4] * values[:4] @ right[:4]
    ours, theirs = ((inputs @ (weight - each).t()).norm() for each in (up @ down, plain))
    assert ours < 0.8 * theirs
