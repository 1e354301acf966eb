# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.latents.low_rank import (
    Factor,
    asvd,
    closed_form,
    key_metric,
    moments,
    relative_error,
    svd,
    value_metric,
)

SEEDS = st.integers(0, 999)


def projection(seed: int, inputs: int = 12, features: int = 8) -> tuple[torch.Tensor, ...]:
    """Correlated, shifted x [500, in] with an outlier channel, weight [in, F] and bias [F]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(500, inputs) @ normal(inputs, inputs) + normal(inputs)
    x[:, 0] *= 10
    return x, normal(inputs, features), 5 * normal(features)


def some_metric(features: int, seed: int) -> torch.Tensor:
    root = torch.randn(features, features, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


@given(SEEDS, st.integers(1, 8), st.booleans())
@settings(deadline=None)
def test_the_error_is_the_tail_and_never_above_svd_or_asvd(
    seed: int, rank: int, weighted: bool
) -> None:
    x, weight, bias = projection(seed)
    keys = x @ weight + bias
    metric = some_metric(8, seed) if weighted else None
    full, energies = closed_form(*moments(keys), metric)
    assert bool((energies.diff() <= 0).all())
    best = full.cut(rank)
    assert best.encode.shape == (8, rank) and best.decode.shape == (rank, 8)
    error = relative_error(keys, best.project(keys), metric)
    assert error == pytest.approx(float(energies[rank:].sum() / energies.sum()), abs=1e-5)
    for other in (svd(weight, bias), asvd(weight, bias, x.abs().mean(0))):
        assert error <= relative_error(keys, other.cut(rank).project(keys), metric) + 1e-5
    # Encoding again what was restored changes nothing.
    torch.testing.assert_close(best.decode @ best.encode, torch.eye(rank, dtype=torch.float64))


@given(SEEDS, st.integers(1, 8))
@settings(deadline=None)
def test_svd_and_asvd_are_the_published_ones(seed: int, rank: int) -> None:
    x, weight, bias = projection(seed)
    scale = (x.abs().mean(0) + 1e-6) ** 0.5
    for factor, s in (
        (svd(weight, bias), torch.ones_like(scale)),
        (asvd(weight, bias, x.abs().mean(0)), scale),
    ):
        u, singular, v = torch.linalg.svd(s[:, None] * weight, full_matrices=False)
        a = (u * singular.sqrt())[:, :rank] / s[:, None]
        b = (singular.sqrt()[:, None] * v)[:rank]
        found = factor.cut(rank).project(x @ weight + bias)
        torch.testing.assert_close(found, x @ a @ b + bias, rtol=1e-6, atol=1e-6)


@given(SEEDS, st.integers(1, 7))
@settings(deadline=None, max_examples=5)
def test_training_as_in_the_paper_cannot_improve_it(seed: int, rank: int) -> None:
    x, weight, bias = projection(seed)
    keys = x @ weight + bias
    full, energies = closed_form(*moments(keys))
    best = full.cut(rank)
    a, b = weight @ best.encode, best.decode
    shift = best.restore((bias - best.mean) @ best.encode)  # all of A, B and a bias may move
    parameters = [t.clone().requires_grad_() for t in (a, b, shift)]
    trained = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(300):
        loss = (keys - x @ parameters[0] @ parameters[1] - parameters[2]).square().sum(1).mean()
        trained.zero_grad()
        loss.backward()
        trained.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(float(energies[rank:].sum()), rel=1e-6)
    assert min(losses) >= losses[0] * (1 - 1e-6)


def test_a_bias_costs_no_rank_and_full_rank_is_exact() -> None:
    x, weight, bias = projection(0)
    small, _ = closed_form(*moments(x @ weight))
    large, _ = closed_form(*moments(x @ weight + 1000 * bias))
    for rank in (2, 8):
        losses = [
            relative_error(keys, factor.cut(rank).project(keys))
            for factor, keys in ((small, x @ weight), (large, x @ weight + 1000 * bias))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-12)
    assert losses[0] == pytest.approx(0, abs=1e-20)


def test_a_metric_that_is_blind_to_features_is_no_danger() -> None:
    x, weight, bias = projection(0)
    keys = x @ weight + bias
    metric = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).double())
    factor = closed_form(*moments(keys), metric)[0].cut(3)
    restored = factor.project(keys)
    assert relative_error(keys, restored, metric) == pytest.approx(0, abs=1e-4)
    assert bool(torch.isfinite(restored).all())
    torch.testing.assert_close(factor.decode @ factor.encode, torch.eye(3, dtype=torch.float64))


def test_key_metric_is_the_mean_change_of_scores_over_positions() -> None:
    kv_heads, group, half = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    heads = kv_heads * group
    queries = torch.randn(heads, 2, half, generator=generator).double()
    error = torch.randn(kv_heads, 2, half, generator=generator).double()
    angles = torch.rand(100_000, half, generator=generator).double() * 6.283185307179586
    cos, sin = angles.cos(), angles.sin()
    expected = 0.0
    for head in range(heads):
        (a, b), (x, y) = queries[head], error[head // group]
        scores = ((a * cos - b * sin) * x + (b * cos + a * sin) * y).sum(1)
        expected += float(scores.square().mean())
    metric = key_metric(queries.flatten().square(), kv_heads, 2 * half)
    unscaled = metric * queries.square().sum() / heads / (2 * half)  # its mean eigenvalue was one
    found = error.flatten() @ unscaled @ error.flatten()
    assert float(found) * group == pytest.approx(expected, rel=0.05)


def test_value_metric_is_the_change_of_the_output() -> None:
    kv_heads, group, head_dim = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(10, kv_heads * group * head_dim, generator=generator).double()
    error = torch.randn(kv_heads, head_dim, generator=generator).double()
    expected = sum(
        float((output[:, h * head_dim :][:, :head_dim] @ error[h // group]).square().sum())
        for h in range(kv_heads * group)
    )
    scale = output.square().sum() / (kv_heads * head_dim)
    metric = value_metric(output, kv_heads, head_dim) * scale
    assert float(error.flatten() @ metric @ error.flatten()) == pytest.approx(expected)


def test_float_copies() -> None:
    full = Factor(torch.eye(3).double(), torch.eye(3).double(), torch.zeros(3).double())
    small = full.cut(2).float()
    assert small.encode.dtype == torch.float32 and small.encode.is_contiguous()
    assert small.latent(torch.ones(5, 3)).shape == (5, 2)
