# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress prune``: what it prints, what knows the result, and what vLLM serves."""

import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from tests.conftest import MORE_MODELS, TINY_MODELS
from tests.support.generate import generate
from vllm_plugin.commands.checks import model_checks
from vllm_plugin.kv_fingerprint import fingerprint_of, published_weights

DEPTH = 8
PROMPTS = ["The capital of France is Paris, and", "def add(a, b):\n    return a + b"]
QUICK = ("--samples", 8, "--length", 32)
# The other four of five architectures take an engine each.
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("gemma3", "qwen3", "phi3", "olmo2")]


@pytest.fixture
def deep_model(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    def make(arch: str = "llama") -> Path:
        own = (TINY_MODELS | MORE_MODELS)[arch][1]
        kinds = {"layer_types": own["layer_types"] * 4} if "layer_types" in own else {}
        return tiny_model(arch, num_hidden_layers=DEPTH, **kinds)

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_it_prunes_draws_and_says_what_nats_hide(
    run: Callable, deep_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    asked = (deep_model(), "--drop", 2, "--search", "greedy", "--calibration", text, *QUICK)
    code, output, errors = run("prune", *asked, "--out", "less", "--plot", "less.png")
    assert code == 0, errors
    assert "8 -> 6" in output and "KL on held-out text" in output
    assert "exact answers (arithmetic, facts, recall) suffer more than nats say" in output
    assert "matter more than the search" not in output  # the text was given
    assert "serve it: vllm serve less" in output
    assert (tmp_path / "less.png").read_bytes().startswith(b"\x89PNG")
    dropped = json.loads((tmp_path / "less" / "report.json").read_text())["dropped"]
    told = f"of {DEPTH} are gone, healed by refit"

    vllm_plugin.register()
    checks = model_checks(EngineArgs(model="less", max_model_len=256))
    found = [check.found for check in checks if check.name == "depth"]
    assert len(found) == 1 and told in found[0] and str(dropped[0]) in found[0]
    code, output, errors = run("plan", "less", "--gpu-memory", "1GiB", "--context", 512)
    assert code == 0, errors
    assert "The model is pruned: blocks" in output and told in output


def test_nothing_is_drawn_or_warned_of_where_nothing_goes(
    run: Callable, deep_model: Callable[..., Path], tmp_path: Path
) -> None:
    whole, plot = tmp_path / "whole", tmp_path / "a.png"
    command = ("prune", deep_model(), "--drop", 0, "--out", whole, "--plot", plot)
    code, output, errors = run(*command)
    assert code == 0, errors
    assert "nothing to measure or to draw" in output and "exact answers" not in output
    assert not plot.exists() and "written" not in output
    code, _, errors = run(*command)
    assert code and "whole exists" in errors


def test_options_that_exclude_each_other(run: Callable, deep_model: Callable[..., Path]) -> None:
    model = deep_model()
    for options, told in {
        ("--drop", 1, "--layers", "3"): "give only one of --drop and --layers",
        (): "give one of --drop, --layers and --max-loss",
        ("--layers", "a"): "is no list of blocks, such as 12-15 or 3,8-10",
        ("--keep-first", 2, "--drop", 1, "--plot", "a.png"): "--drop, --plot cannot be used with",
        ("--layers", "3", "--search", "greedy"): "--layers leaves nothing for --search greedy",
        ("--drop", 1, "--dimensions", 64): "--dimensions needs --keep-first",
        ("--drop", 1, "--samples", 7): "two of 8 are held out",
        ("--drop", 1, "--set", "far=x"): "far",
        ("--drop", 1, "--set", "heal.ridge=1"): "did you mean 'ridges'",
    }.items():
        code, _, errors = run("prune", model, "--out", "less", *options)
        assert code == 1 and told in errors, errors


def test_adapters_and_profiles_of_the_original_are_refused(
    run: Callable, deep_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = deep_model()
    asked = (model, "--layers", "3", "--heal", "none", "--calibration", text, *QUICK)
    code, _, errors = run("prune", *asked, "--out", "less")
    assert code == 0, errors
    vllm_plugin.register()
    shared: dict[str, Any] = {"max_model_len": 256, "enable_lora": True}
    assert EngineArgs(model=str(model), **shared).create_engine_config().lora_config
    for more in ({}, {"quantization": "rtn"}):
        with pytest.raises(
            CompressError, match="this checkpoint is pruned .blocks 3 of 8 are gone"
        ):
            EngineArgs(model="less", **shared | more).create_engine_config()

    first, second = (
        fingerprint_of(str(folder), config, published_weights(str(folder), config))
        for folder in (model, tmp_path / "less")
        for config in [Checkpoint(folder).hf_config]
    )
    assert "num_hidden_layers is 7 in the file, 8 in the model" in second.differences(first)
    other = second.model_copy(update={"weights": first.weights})  # of another set of blocks
    assert "weights differ" in second.differences(other)[0]


def expected(folder: Path) -> list[list[float]]:
    """Negative log probability of each token after the first, from transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = model(tokens).logits[0, :-1].log_softmax(-1)
        found.append((-log_p.gather(1, tokens[0, 1:, None])[:, 0]).tolist())
    return found


@pytest.mark.parametrize("arch", ["llama", *SLOW])
def test_stock_vllm_gives_the_log_probabilities_of_transformers(
    run: Callable, deep_model: Callable[..., Path], text: Path, tmp_path: Path, arch: str
) -> None:
    asked = (deep_model(arch), "--layers", "2,5", "--heal", "none", "--calibration", text, *QUICK)
    code, _, errors = run("prune", *asked, "--out", "less", "--force")
    assert code == 0, errors
    stock = {"VLLM_PLUGINS": ""}
    served = generate(tmp_path / "less", PROMPTS, env=stock, max_tokens=2, dtype="float32")
    for ours, theirs in zip(served["prompt_nats"], expected(tmp_path / "less"), strict=True):
        assert all(math.isclose(a, b, abs_tol=2e-2) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_pruned_then_quantized_then_served_with_a_policy(
    run: Callable, demo_model: Path, text: Path, tmp_path: Path
) -> None:
    quick = ("--calibration", text, "--samples", 8, "--length", 64)
    asked = (demo_model, "--layers", "13-14", "--heal", "refit", *quick)
    code, _, errors = run("prune", *asked, "--out", "less")
    assert code == 0, errors
    code, _, errors = run("quantize", "less", "--out", "less-int4", *quick)
    assert code == 0, errors
    config = json.loads((tmp_path / "less-int4" / "config.json").read_text())
    assert config["vllm_compress_depth"]["dropped"] == [13, 14]
    source = config["quantization_config"]["vllm_compress"]["source"]
    assert source == Checkpoint(tmp_path / "less").weights_digest
    prompt = text.read_text()[:1500]
    kv = {"policy": "snap_kv", "keep": 0.5}
    env = {"VLLM_CPU_KVCACHE_SPACE": os.environ["VLLM_CPU_KVCACHE_SPACE"]}
    shared: dict[str, Any] = {"max_tokens": 8, "env": env, "dtype": "bfloat16"}
    sixteen = generate(tmp_path / "less", [prompt], **shared)
    section = {"compress": {"kv": kv}}
    both = generate(tmp_path / "less-int4", [prompt], additional_config=section, **shared)
    nats = [statistics.fmean(served["prompt_nats"][0]) for served in (sixteen, both)]
    assert nats[1] - nats[0] < 0.5
    assert both["texts"][0].strip()
