# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a transformers model, rounded or with its transforms alone."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from compress_common.checkpoints.identity import tensor_digest
from quant_methods.formats.plan import Plan
from quant_methods.grid import QuantizedWeight

TOKENS = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def with_plan(model: torch.nn.Module, plan: Plan, rounded: bool) -> torch.Tensor:
    """Logits of TOKENS after the plan is applied to the model's own weights."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:  # a checkpoint stores them once
        del state["lm_head.weight"]
    plan.sources = {name: tensor_digest(tensor) for name, tensor in state.items()}
    new = {}
    for name, value in plan.transform(state.items(), next(model.parameters()).dtype):
        if isinstance(value, QuantizedWeight):
            weight = state[f"{name}.weight"]
            smooth = value.dequantize() if rounded else plan.smoothed(name, weight)
            new[f"{name}.weight"] = smooth.to(weight.dtype)
        else:
            new[name] = value
    if plan.copies:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.load_state_dict(new, strict=False)
    return model(TOKENS).logits.float()


def rounded_weights(model: torch.nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The weights of quantized linears as a plan without transforms rounds them."""
    state = model.state_dict()
    return {
        f"{name}.weight": plan.quantized(name, state[f"{name}.weight"], torch.bfloat16).dequantize()
        for name in plan.grids
    }
