# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with int4 weights: the same text, and drafts of their own precision."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from tests.support.child import SINGLE_PROCESS, in_child
from tests.support.generate import QUICK_WEIGHTS

PROMPTS = [
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    "one two three four one two three four one two three",
]
TOKENS = 24
INT4: dict[str, Any] = {
    "quantization": "smoothquant_plus",
    "additional_config": {"compress": {"weights": QUICK_WEIGHTS | {"activations": "bf16"}}},
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def draft(model: Path, **more: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3} | more


def _drafter(worker: Any) -> list[str]:
    """In a worker: what multiplies the linears of the draft model."""
    model = getattr(worker.model_runner.drafter, "model", None)
    modules = [] if model is None else model.modules()
    linears = [m.quant_method for m in modules if "Linear" in type(m).__name__]
    return sorted({type(method).__name__ for method in linears})


def _answer(model: str, speculative: dict[str, Any] | None, engine: dict[str, Any]) -> Any:
    """In a child: greedy tokens, how many drafted ones were accepted, and the draft's linears."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        speculative_config=speculative,
        max_model_len=256,
        enforce_eager=True,
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        disable_log_stats=False,
        **engine,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics() if "spec_decode" in m.name}
    methods = llm.collective_rpc(_drafter)[0] if speculative else []
    llm.llm_engine.engine_core.shutdown()
    accepted = counts.get("vllm:spec_decode_num_accepted_tokens", 0)
    return [list(o.outputs[0].token_ids) for o in outputs], accepted, methods


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    env = os.environ | SINGLE_PROCESS | {"COMPRESS_INT4_ROWS": "16"}
    known: dict[str, Any] = {}

    def answer(model: Path, speculative: dict[str, Any] | None, engine: dict[str, Any]) -> Any:
        key = repr((model, speculative, engine))
        if key not in known:
            given = str(model), speculative, engine
            known[key] = in_child(_answer, *given, env=env, timeout=600)
        return known[key]

    return answer


@pytest.mark.parametrize("kind", ["ngram", "draft_model"])
def test_drafts_do_not_change_what_int4_says(
    answer: Callable[..., Any], demo_model: Path, kind: str
) -> None:
    plain, none, _ = answer(demo_model, None, INT4)
    speculative = NGRAM if kind == "ngram" else draft(demo_model)
    tokens, accepted, linears = answer(demo_model, speculative, INT4)
    assert tokens == plain
    assert none == 0 and accepted >= 5
    # The draft model does not inherit the quantization.
    assert linears == ([] if kind == "ngram" else ["UnquantizedLinearMethod"])


@pytest.mark.slow
@pytest.mark.parametrize("target", [INT4, {}], ids=["int4", "bf16"])
def test_a_written_int4_model_drafts(
    answer: Callable[..., Any], demo_model: Path, tmp_path: Path, target: dict[str, Any]
) -> None:
    request = PlanRequest(method="rtn", settings={"group_size": 64})
    quantize_checkpoint(demo_model, tmp_path / "int4", request)
    plain, _, _ = answer(demo_model, None, target)
    tokens, accepted, linears = answer(demo_model, draft(tmp_path / "int4"), target)
    assert tokens == plain and accepted >= 5
    assert "CompressedTensorsLinearMethod" in linears


def eagle3(model: Path, folder: Path) -> Path:
    """Write an EAGLE-3 head of random quality: a layer of the model, twice as wide at its input."""
    folder.mkdir()
    tensors, layer = dict(Checkpoint(model).tensors()), "model.layers.0."
    head = {n.replace(layer, "midlayer."): t for n, t in tensors.items() if n.startswith(layer)}
    for name, tensor in head.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            head[name] = torch.cat([tensor, tensor], 1)
    norm = tensors["model.norm.weight"]
    eye = torch.eye(len(norm), dtype=norm.dtype)
    head["midlayer.hidden_norm.weight"] = norm.clone()
    head |= {"norm.weight": norm, "fc.weight": torch.cat([eye, eye, eye], 1) / 3}
    save_file(
        head | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        folder / "model.safetensors",
    )
    config = json.loads((model / "config.json").read_text())
    own = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    own |= {"tie_word_embeddings": False, "draft_vocab_size": config["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config | own))
    return folder


@pytest.mark.slow
def test_an_eagle3_head_keeps_its_16_bits(
    answer: Callable[..., Any], demo_model: Path, tmp_path: Path
) -> None:
    plain, _, _ = answer(demo_model, None, INT4)
    head = eagle3(demo_model, tmp_path / "eagle3")
    speculative = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 2}
    tokens, _, linears = answer(demo_model, speculative, INT4)
    assert tokens == plain and linears == ["UnquantizedLinearMethod"]


def configure(model: Path, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    return EngineArgs(model=str(model), max_model_len=256, **engine).create_engine_config()


def test_what_was_not_tested_is_refused(demo_model: Path) -> None:
    by_load = draft(demo_model, quantization="rtn")
    told = r"--speculative-config: a draft model is not quantized .*vllm-compress quantize .*rtn"
    for target in (INT4, {}):  # also beside a 16-bit model, where it would fail in the worker
        with pytest.raises(CompressError, match=told):
            configure(demo_model, speculative_config=by_load, **target)
    eagle = {"method": "eagle", "model": str(demo_model), "num_speculative_tokens": 2}
    told = "drafts of 'eagle' .* were never tested .*; use ngram, ngram_gpu, suffix, draft_model or"
    with pytest.raises(CompressError, match=told):
        configure(demo_model, speculative_config=eagle, **INT4)
    assert configure(demo_model, speculative_config=eagle).speculative_config  # stock is left alone
    kv = {"compress": {"kv": {"policy": "snap_kv", "keep": 0.5}}}
    with pytest.raises(CompressError, match="--speculative-config"):
        configure(demo_model, quantization="rtn", additional_config=kv, speculative_config=NGRAM)


def test_an_allocator_that_vllm_refuses_beside_drafts_and_figures(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses it for the draft's config alone, once the target is loaded."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(CompressError, match=r"PYTORCH_CUDA_ALLOC_CONF.*compress\.metrics false"):
        configure(demo_model, quantization="rtn", speculative_config=draft(demo_model))
    without = {"compress": {"metrics": False}}
    assert configure(
        demo_model,
        quantization="rtn",
        speculative_config=draft(demo_model),
        additional_config=without,
    )
    assert configure(demo_model, quantization="rtn", speculative_config=NGRAM)
