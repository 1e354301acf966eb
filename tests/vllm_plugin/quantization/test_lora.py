# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on int4 weights: served where linears keep their inputs, refused elsewhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.planning import obtain_plan
from tests.support.child import SINGLE_PROCESS, in_child
from tests.support.plans import load, rounded_weights
from vllm_plugin.settings import WeightSettings

PROMPTS = ["The capital of France is", "def add(a, b):\n    return"]
SETTINGS: dict[str, Any] = {"group_size": 32, "calibration": {"samples": 4, "length": 32}}
FOLDED = SETTINGS | {"alpha": 0.5, "rounding": "nearest", "clip": False}
RANK, ALPHA = 8, 16


def at_load(**weights: Any) -> dict[str, Any]:
    section = {"weights": weights | {"activations": "bf16"}}
    return {"quantization": "smoothquant_plus", "additional_config": {"compress": section}}


def adapter(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write an adapter for all linears. Returns what it adds to each weight."""
    folder.mkdir()
    random, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    for name, weight in Checkpoint(model).tensors():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            continue
        a = torch.randn(RANK, weight.shape[1], generator=random).mul(0.1).bfloat16()
        b = torch.randn(weight.shape[0], RANK, generator=random).mul(0.1).bfloat16()
        prefix = f"base_model.model.{linear}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        deltas[name] = b.float() @ a.float() * ALPHA / RANK
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in deltas})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return deltas


def _nats(model: str, lora: str, engine: dict[str, Any]) -> list[list[list[float]]]:
    """In a child: of each prompt, without and with the adapter, in one engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model,
        enable_lora=True,
        max_lora_rank=RANK,
        max_model_len=256,
        enforce_eager=True,
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        **engine,
    )
    sampling, found = SamplingParams(max_tokens=1, prompt_logprobs=0), []
    for request in (None, LoRARequest("adapter", 1, lora)):
        outputs = llm.generate(PROMPTS, sampling, lora_request=request, use_tqdm=False)
        found.append(
            [
                [
                    -given[token].logprob
                    for token, given in zip(
                        o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True
                    )
                ]
                for o in outputs
            ]
        )
    llm.llm_engine.engine_core.shutdown()
    return found


def test_an_adapter_adds_to_a_plan_without_folds(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The default of smoothquant_plus, GPTQ, at load."""
    folder = tiny_model("qwen2")
    deltas = adapter(folder, tmp_path / "adapter")
    env = os.environ | SINGLE_PROCESS
    given = str(folder), str(tmp_path / "adapter"), at_load(**SETTINGS)
    without, adapted = in_child(_nats, *given, env=env, timeout=600)

    request = WeightSettings(**SETTINGS).request("smoothquant_plus", 1)
    plan, stored = obtain_plan(Checkpoint(folder), request)
    assert stored and plan.codes and not plan.vectors
    model = load(folder, torch.float32)
    rounded = rounded_weights(model, plan)
    for weights, served in (
        (rounded, without),
        ({name: weight + deltas[name] for name, weight in rounded.items()}, adapted),
    ):
        model.load_state_dict(weights, strict=False)
        for prompt, found in zip(PROMPTS, served, strict=True):
            error = (torch.tensor(found) - wanted(model, folder, prompt)).abs().mean()
            assert error < 0.06
    moved = (torch.tensor(without[0]) - torch.tensor(adapted[0])).abs().mean()
    assert moved > 0.3


@torch.no_grad()
def wanted(model: torch.nn.Module, folder: Path, prompt: str) -> torch.Tensor:
    """Negative log probability of each token after the first."""
    tokens = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    logits = model(tokens).logits[0, :-1].float()
    return -logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def configure(model: Path, **engine: Any) -> Any:
    vllm_plugin.register()
    args = EngineArgs(model=str(model), max_model_len=256, enable_lora=True, **engine)
    return args.create_engine_config().lora_config


def test_adapters_are_refused_exactly_where_inputs_change(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    assert configure(model, quantization="rtn")
    assert configure(model, **at_load())
    assert configure(model, **at_load(folds="none", rounding="nearest"))
    for folded in (FOLDED, {"folds": "norms"}, {"rounding": "nearest"}):
        told = "--enable-lora: with these settings smoothquant_plus changes the inputs of linears"
        with pytest.raises(CompressError, match=told):
            configure(model, **at_load(**folded))
    for name, settings in (("plain", SETTINGS), ("folded", FOLDED)):
        request = WeightSettings(**settings).request("smoothquant_plus", 1)
        quantize_checkpoint(model, tmp_path / name, request)
    assert configure(tmp_path / "plain")
    with pytest.raises(CompressError, match="changed the inputs of linears in this checkpoint"):
        configure(tmp_path / "folded")
    for name, settings in (("awq", SETTINGS), ("folded-awq", FOLDED)):
        request = WeightSettings(**settings).request("smoothquant_plus", 1)
        quantize_checkpoint(model, tmp_path / name, request, format_name="awq")
    assert configure(tmp_path / "awq")
    awq = tmp_path / "folded-awq"
    with pytest.raises(CompressError, match="changed the inputs of linears in this checkpoint"):
        configure(awq)  # vLLM's own config serves it
    config = json.loads((awq / "config.json").read_text())
    del config["quantization_config"]["vllm_compress"]
    (awq / "config.json").write_text(json.dumps(config))
    assert configure(awq)  # as if another tool had written it
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["vllm_compress"]["inputs_kept"]  # an older version's
    file.write_text(json.dumps(config))
    with pytest.raises(CompressError, match="or did not note it"):
        configure(tmp_path / "plain")


def test_quantized_experts_are_refused_with_adapters(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(CompressError, match="experts were never tested with --enable-lora"):
        configure(tiny_model("qwen3_moe"), quantization="rtn")
