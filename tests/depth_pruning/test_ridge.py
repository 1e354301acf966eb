# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depth_pruning.ridge import Moments, chosen, solution

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))


def tokens(inputs: int, outputs: int, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=random)
    return x, torch.randn(count, outputs, generator=random), torch.rand(count, generator=random)


def summed(*given: torch.Tensor) -> Moments:
    moments = Moments.zeros(given[0].shape[1], given[1].shape[1], torch.device("cpu"))
    moments.add(*(part[:3] for part in given))
    moments.add(*(part[3:] for part in given))
    return moments


@settings(deadline=None)
@given(SIZES, st.floats(0.01, 10))
def test_the_solution_is_the_least_squares_of_extra_rows(
    sizes: tuple[int, int, int, int], ridge: float
) -> None:
    """A ridge is one more row for each input, which asks for a correction of zero."""
    x, y, weights = tokens(*sizes)
    moments = summed(x, y, weights)
    scale = (ridge * moments.gram.diagonal().mean()).sqrt()
    root = weights.sqrt()[:, None]
    rows = torch.cat([x * root, scale * torch.eye(sizes[0])]).double()
    wanted = torch.cat([y * root, torch.zeros(sizes[0], sizes[1])]).double()
    reference = torch.linalg.lstsq(rows, wanted).solution.t().float()
    torch.testing.assert_close(solution(moments, ridge), reference, rtol=1e-2, atol=1e-3)


@settings(deadline=None)
@given(SIZES)
def test_the_error_is_that_of_the_tokens(sizes: tuple[int, int, int, int]) -> None:
    x, y, weights = tokens(*sizes)
    moments, delta = summed(x, y, weights), torch.full((sizes[1], sizes[0]), 0.1)
    left = ((y - x @ delta.t()).square().sum(-1) * weights).sum()
    whole = (y.square().sum(-1) * weights).sum()
    torch.testing.assert_close(moments.error(delta), float(left / whole), rtol=1e-3, atol=1e-3)


def test_what_holds_on_other_tokens_is_chosen_and_noise_is_not() -> None:
    random = torch.Generator().manual_seed(0)
    true = torch.randn(4, 8, generator=random)

    def of(count: int, noise: float) -> Moments:
        x = torch.randn(count, 8, generator=random)
        y = x @ true.t() + noise * torch.randn(count, 4, generator=random)
        return summed(x, y, torch.ones(count))

    delta, error = chosen(of(200, 0.1), of(200, 0.1))
    assert delta is not None and error < 0.05
    torch.testing.assert_close(delta, true, atol=0.2, rtol=0)
    x, y, weights = tokens(8, 4, 10, seed=1)
    assert chosen(summed(x, y, weights), summed(x, -y, weights)) == (None, 1.0)


def test_inputs_of_zero_are_no_error() -> None:
    nothing = summed(torch.zeros(5, 3), torch.ones(5, 2), torch.ones(5))
    delta, error = chosen(nothing, nothing)
    assert error == 1.0 and delta is None
