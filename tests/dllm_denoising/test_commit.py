# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_denoising.commit import CommitRule, Fixed, Threshold, gumbel, predict

CONFIDENCES = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(np.array)


@given(CONFIDENCES, st.floats(0.01, 1))
def test_threshold_is_the_smaller_of_itself_and_the_best(
    confidence: np.ndarray, least: float
) -> None:
    chosen = Threshold(least).choose(confidence)
    assert chosen.dtype == bool and chosen[confidence.argmax()]
    bar = min(least, max(confidence.tolist()))
    assert chosen.tolist() == [one >= bar for one in confidence.tolist()]


@given(CONFIDENCES, st.integers(1, 30))
def test_fixed_takes_the_most_confident(confidence: np.ndarray, count: int) -> None:
    chosen = Fixed(count).choose(confidence)
    assert chosen.dtype == bool and chosen.sum() == min(count, len(confidence))
    if not chosen.all():
        assert confidence[chosen].min() >= confidence[~chosen].max()


@pytest.mark.parametrize("rule", [Threshold(0.9), Threshold(1.0), Fixed(1), Fixed(3)])
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, np.nan]), min_size=1, max_size=4).map(np.array))
def test_at_least_one_whatever_the_confidences(rule: CommitRule, confidence: np.ndarray) -> None:
    assert rule.choose(confidence).any()  # NaN too: a step without a token repeats for ever


@given(st.integers(0, 999), st.booleans())
@settings(deadline=None)
def test_prediction_is_the_softmax_without_the_mask(seed: int, noisy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, 10, generator=generator) * 8).bfloat16()
    mask = seed % 10
    logits[::2, mask] = 100  # the likeliest by far
    noise = gumbel((6, 10), 1.5, generator) if noisy else None
    confidence, tokens = predict(logits, mask, None if noise is None else noise.clone())
    others = [token for token in range(10) if token != mask]
    scores = logits[:, others].double()
    want = scores.softmax(-1)
    best = (scores if noise is None else scores + noise[:, others]).argmax(-1)
    assert confidence.dtype == torch.float64 and tokens.dtype == torch.int64
    assert tokens.tolist() == [others[i] for i in best]
    assert torch.allclose(confidence, want.gather(1, best[:, None])[:, 0], rtol=2e-6, atol=1e-38)


def test_near_certain_rows_keep_their_order() -> None:
    """Their probabilities are all 1 in float32."""
    logits = torch.zeros(30, 50)
    logits[torch.arange(30), torch.arange(30)] = torch.arange(20.0, 50.0)
    confidence, _ = predict(logits, 49)
    assert (confidence[:15].diff() > 0).all()
    want = logits[:, :49].double().softmax(-1).amax(-1)
    assert torch.allclose(1 - confidence, 1 - want, rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_prediction_leaves_its_logits_alone(dtype: torch.dtype) -> None:
    logits = torch.ones(2, 5, dtype=dtype)
    predict(logits, 3, torch.ones(2, 5))
    assert (logits == 1).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_as_often_as_the_softmax_says(temperature: float) -> None:
    draws, logits = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    noise = gumbel((draws, 6), temperature, generator)
    assert noise.dtype == torch.float32 and bool(noise.isfinite().all())
    _, tokens = predict(logits.expand(draws, 6), 4, noise)
    logits[4] = -torch.inf  # the mask
    want = (logits / temperature).softmax(-1)
    assert torch.allclose(tokens.bincount(minlength=6) / draws, want, atol=0.01)  # 4 deviations


def test_noise_is_of_its_seed_and_scaled_by_the_temperature() -> None:
    def noise(seed: int, temperature: float = 1.0) -> torch.Tensor:
        return gumbel((3, 7), temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(noise(1), noise(1)) and not torch.equal(noise(1), noise(2))
    assert torch.allclose(noise(1, 0.3), 0.3 * noise(1))


def test_noise_in_parts_is_that_of_one_call() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = [gumbel((rows, 33), 1.0, generator) for rows in (1, 4, 2)]
    whole = gumbel((7, 33), 1.0, torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(parts), whole)
