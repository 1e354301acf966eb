# SPDX-License-Identifier: Apache-2.0
"""Token weights equal those of the whole attention matrix, and mean what their names say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compress_common.calibration.blocks import Blocks
from compress_common.structure.derive import structure_of
from quant_methods.calibration import attention_received as received
from quant_methods.calibration.token_weights import (
    ActivationNorm,
    FirstTokens,
    TokenWeights,
    normalized,
    rescaled,
)
from tests.support.plans import TOKENS


@pytest.mark.parametrize("length", [32, 96])  # 96: longer than the window of gemma3
def test_scores_are_those_of_the_whole_matrix(
    each_tiny_model: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped queries, biases, norms on q and k, windows; chunks of a few queries.

    Everything is float64 except for the softmax of transformers' eager attention, which is float32.
    """
    tokens = TOKENS.repeat(1, length // 32)
    eager = AutoModelForCausalLM.from_pretrained(
        each_tiny_model, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        whole = eager(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    model = AutoModelForCausalLM.from_pretrained(each_tiny_model, dtype=torch.float64)
    blocks = Blocks(model, structure_of(model.config), tokens)
    monkeypatch.setattr(
        received.attention_received, "__defaults__", (None, None, 7 * 4 * 2 * length)
    )
    for index, attention in enumerate(whole.attentions):
        with torch.no_grad():
            scores = received.scores_of(blocks, index, whole.hidden_states[index])
        torch.testing.assert_close(scores, attention.sum((1, 2)), rtol=1e-6, atol=1e-6)
        weights = received.AttentionReceived(0.01)(blocks, index, whole.hidden_states[index])
        assert weights.dtype == torch.float32
        assert (weights.argmax(1) == scores.argmax(1)).all()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, model(tokens).logits)


@given(st.integers(0, 1000), st.integers(1, 400), st.sampled_from([None, 5.0]))
@settings(deadline=None, max_examples=30)
def test_chunks_and_masks_give_the_attention_of_the_whole_matrix(
    seed: int, chunk: int, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    whole = scores.masked_fill(~seen, -torch.inf).softmax(-1).sum((1, 2))
    parts = received.attention_received(query, key, 0.3, softcap=softcap, chunk=chunk)
    torch.testing.assert_close(parts, whole)
    added = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    for mask in (seen, added):
        masked = received.attention_received(query, key, 0.3, mask, softcap, chunk)
        torch.testing.assert_close(masked, whole)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=40), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_normalized_weights_keep_the_mean_energy(given_weights: list[float], factor: float) -> None:
    """GPTQ damps by the mean energy, so a common factor must not change the weights."""
    weights = torch.tensor([given_weights, [0.0] * len(given_weights)], dtype=torch.float64)
    result = normalized(weights)
    assert result.dtype == torch.float32 and torch.isfinite(result).all()
    if weights.max() > 1e-6:
        assert result[0].mean().item() == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(normalized(factor * weights), result, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result[0] * weights[0].mean(), weights[0], check_dtype=False)
    assert (result[1] == 0).all()  # a sample that counts for nothing is no division by zero


@given(
    st.lists(st.floats(-1e3, 1e6, width=32), min_size=2, max_size=40),
    st.floats(1e-3, 1),
    st.sampled_from([1, 2]),
)
@settings(deadline=None)
def test_weights_have_a_mean_of_one_and_the_order_of_scores(
    scores: list[float], least: float, power: int
) -> None:
    given_scores = torch.tensor([scores], dtype=torch.float64)
    weights = rescaled(given_scores, least, power)
    assert weights.mean().item() == pytest.approx(1, rel=1e-4)
    assert (weights > 0).all()
    assert weights.min() / weights.max() >= least**power * (1 - 1e-4)
    assert (weights[0, given_scores[0].argsort()].diff() >= 0).all()
    if min(scores) == max(scores):
        torch.testing.assert_close(weights, torch.ones_like(weights))


@pytest.mark.parametrize("weigh", [ActivationNorm(0.1), FirstTokens(0.25, 0.1, power=2)])
def test_controls(weigh: TokenWeights, tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    blocks = Blocks(model, structure_of(model.config), TOKENS)
    hidden = blocks.inputs()
    weights = weigh(blocks, 0, hidden)
    torch.testing.assert_close(weights.mean(1), torch.ones(2))
    if isinstance(weigh, FirstTokens):
        assert (weights[:, :8] == weights[0, 0]).all()
        torch.testing.assert_close(weights[:, 8:], 0.01 * weights[:, :1].expand(2, 24))
    else:
        assert torch.equal(weights.argmax(1), hidden.norm(dim=-1).argmax(1))
