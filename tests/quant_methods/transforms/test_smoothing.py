# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.structure.layer_structure import Fold
from quant_methods.grid import Grid, fake_quantize
from quant_methods.transforms.smoothing import (
    clip_percents,
    fold_into_norm,
    search_alpha,
    smoothing_vector,
    to_consumer,
    to_producer,
)

GQA = Fold("self_attn.v_proj", ("self_attn.o_proj",), False, repeat=3, head_dim=4)


@given(st.integers(0, 20), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_smoothing_vector_is_positive_centered_and_finite(step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    amax, wmax = torch.rand(2, 64, generator=generator) * torch.tensor([[100.0], [0.1]])
    amax[0], wmax[1] = 0, 0  # a dead channel
    vector = smoothing_vector(amax, wmax, step / 20)
    assert torch.isfinite(vector).all()
    assert (vector > 0).all()


def test_alpha_balances_activations_against_weights() -> None:
    amax, wmax = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0])
    flat = smoothing_vector(amax, wmax, 0.0)
    full = smoothing_vector(amax, wmax, 1.0)
    assert torch.allclose(flat, torch.ones(2))
    assert torch.allclose(full[1] / full[0], torch.tensor(4.0))


def test_grouped_heads_round_trip() -> None:
    producer = torch.arange(8.0)  # two kv heads of four channels
    consumer = to_consumer(GQA, producer)
    assert consumer.shape == (24,)
    assert torch.equal(consumer.view(2, 3, 4)[:, 0], producer.view(2, 4))
    assert torch.equal(to_producer(GQA, consumer), producer)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_times_realised_scale_is_the_norm(offset: float) -> None:
    """What bf16 loses in the stored norm, the returned scale makes up exactly."""
    weight = torch.randn(512).bfloat16() * 0.3 + (1 - offset)
    scale = torch.rand(512) * 30 + 0.01
    stored, realised = fold_into_norm(weight, scale, offset)
    assert stored.dtype == weight.dtype
    rebuilt = (stored.float() + offset) * realised
    assert torch.allclose(rebuilt, weight.float() + offset, rtol=1e-5, atol=1e-6)


def test_clip_never_raises_the_weighted_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    weight[:, 5] *= 6
    mean_square = torch.rand(128, generator=generator)
    mean_square[5] = 0.01  # the outlier hardly matters
    grid = Grid(64)
    percents = clip_percents(weight, grid, mean_square)
    assert percents.dtype == torch.uint8

    def error(shrink: torch.Tensor | None) -> torch.Tensor:
        return ((fake_quantize(weight, grid, shrink) - weight).square() * mean_square).sum()

    assert error(percents.float() / 100) < error(None)


@pytest.mark.parametrize("best", [0.0, 0.05, 0.35, 0.5, 0.65, 0.95, 1.0])
@pytest.mark.parametrize("coarse", [0.2, 0.05])
def test_search_finds_the_minimum_of_a_convex_loss(best: float, coarse: float) -> None:
    alpha, curve = search_alpha(lambda a: (a - best) ** 2, coarse=coarse)
    assert alpha == pytest.approx(best)
    assert len(curve) == 21 if coarse == 0.05 else len(curve) <= 10
