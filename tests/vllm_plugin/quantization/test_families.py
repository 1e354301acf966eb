# SPDX-License-Identifier: Apache-2.0
"""Decoders that nothing here knows by name, quantized at load, against transformers' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.structure.experts import unstack
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.conftest import EXPERT_MODELS, MORE_MODELS
from tests.support.generate import generate
from tests.support.plans import load, rounded_weights

PROMPTS = ["The capital of France is", "def add(a, b):\n    return"]
# Fused linears; biases, LayerNorm and an MLP without a gate; routed and shared experts.
FAST = ("phi3", "qwen2_moe", "starcoder2")
SETTINGS = {"group_size": 32}


@pytest.mark.parametrize(
    "arch",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(MORE_MODELS | EXPERT_MODELS)
    ],
)
def test_an_engine_computes_what_transformers_does_with_the_plan(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    folder = tiny_model(arch)
    request = PlanRequest(method="rtn", settings=SETTINGS)
    plan, _ = obtain_plan(Checkpoint(folder), request)
    assert not plan.report["left_at_16_bit"]
    assert plan.structure is not None and plan.structure.depth == 2

    config = {"compress": {"weights": SETTINGS | {"activations": "bf16"}}}
    served = generate(folder, PROMPTS, max_tokens=1, quantization="rtn", additional_config=config)
    assert served["quantization"] == "rtn"

    model = load(folder, torch.float32)
    unstack(model)
    stock = [_nats(model, folder, prompt) for prompt in PROMPTS]
    model.load_state_dict(rounded_weights(model, plan), strict=False)
    for prompt, plain, found in zip(PROMPTS, stock, served["prompt_nats"], strict=True):
        wanted, got = _nats(model, folder, prompt), torch.tensor(found)
        error = (got - wanted).abs().mean()
        assert error < 0.06
        assert error < 0.5 * (got - plain).abs().mean()  # 4 bits are far from 16


@torch.no_grad()
def _nats(model: torch.nn.Module, folder: Path, prompt: str) -> torch.Tensor:
    """Negative log probability of each token after the first."""
    tokens = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    logits = model(tokens).logits[0, :-1].float()
    return -logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
