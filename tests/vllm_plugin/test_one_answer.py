# SPDX-License-Identifier: Apache-2.0
"""Doctor, plan, the config edge and the worker say the same of a model, before weights are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from benchmarks import models_table
from benchmarks.architectures import FAMILIES, OTHERS, TEXT
from compress_common.errors import CompressError
from tests.support import one_answer
from tests.support.child import ROOT
from vllm_plugin.compatibility import model_length
from vllm_plugin.kv_fingerprint import full_attention_layers
from vllm_plugin.settings import parse_settings

MATRIX = ROOT / "docs" / "models.md"
SNAP = {"policy": "snap_kv", "keep": 0.25}
CSKV = {"policy": "cskv", "keep": 1}  # every check, but no bases are needed
INT4 = {"group_size": 32, "calibration": {"samples": 1, "length": 16}}

# What all of them must say of each family: a part of the reason, or None for "accepted".
KV: dict[str, str | None] = dict.fromkeys(FAMILIES) | {
    "mistral windowed": "no layer with full attention",
    "mamba 2": "layers of kinds linear_attention",
    "lfm2": "layers of kinds conv",
    **dict.fromkeys(("granite 4", "nemotron h"), "layers of kinds linear_attention"),
    "jamba": "layers of kinds linear_attention",
    "qwen3 next": "layers of kinds linear_attention",
    "falcon h1": "layers of kinds hybrid",
    "gemma3n text": "layers that share another layer's KV cache",
    "gemma4 e text": "layers that share another layer's KV cache",
    "deepseek v2": "MLA",
    "bloom": "ALiBi",
}
WEIGHTS: dict[str, str | None] = dict.fromkeys(FAMILIES | OTHERS) | {
    "deepseek v2": "multi-head latent attention (MLA)",
    "gpt-oss": "its experts have biases",
    "bert": "it is an encoder, which predicts masked tokens as BERT does",
    "qwen3 moe gelu": "its experts have the activation GELUActivation, where vLLM computes SiLU",
    "llama4 text": "its experts have biases, or are not stacked as",
    "qwen3 next": "weights that are not linears: linear_attn.conv1d",
    **dict.fromkeys(("granite 4", "falcon h1"), "weights that are not linears: mamba.conv1d"),
    **dict.fromkeys(("qwen3.5", "qwen3.5 moe"), "weights that are not linears: linear_attn.conv1d"),
    **dict.fromkeys(("nemotron h", "mamba 2"), "weights that are not linears: mixer.conv1d"),
    "jamba": "weights that are not linears: mamba.A_log, mamba.conv1d",
    "lfm2": "weights that are not linears: conv.conv",
    **dict.fromkeys(("gemma4 text", "gemma4 e text"), "given more than hidden states by position"),
    "gemma3n text": "linears that do not run once in a pass: altup.modality_router",
    "qwen2 audio": "the model around it, of model_type 'qwen2_audio', is not supported",
    "bloom": "0 times through transformers' AttentionInterface",
    "gpt neox": "gives queries, keys and values head by head",
}
LATENTS: dict[str, str | None] = {
    "llama": None,
    "llama yarn": "RoPE of type yarn",
    "mistral": None,
    "qwen2": None,
    "qwen3": None,
    "gemma2": "logits are capped",
    "gemma3 text": None,
    "smollm3": "cskv has bases for models of type",
    "gpt-oss": "attention sinks, which this policy does not count",
}
SECTIONS: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "kv": ({"additional_config": {"compress": {"kv": SNAP}}}, KV),
    "weights": (
        {"quantization": "rtn", "additional_config": {"compress": {"weights": INT4}}},
        WEIGHTS,
    ),
    "latents": ({"additional_config": {"compress": {"kv": CSKV}}}, LATENTS),
    "weights without a method": (
        {"additional_config": {"compress": {"weights": {"alfa": 0.5}}}},
        {"llama": "no weight method of this plugin is chosen"},
    ),
    "diffusion": (
        {"additional_config": {"compress": {"diffusion": {"policy": "elastic"}}}},
        {"llama": "(llama) does not denoise a canvas"},
    ),
}
CASES = [(name, family) for name, (_, said) in SECTIONS.items() for family in said]


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], dict[str, str | None]]:
    # Weights first: vLLM changes the class of a model that it serves through transformers, and then
    # no other engine of the process can follow it.
    cases = sorted(CASES, key=lambda case: case[0] != "weights")
    asked = [(family, SECTIONS[name][0]) for name, family in cases]
    return dict(zip(cases, one_answer.ask(asked), strict=True))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_one_answer(
    answers: dict[tuple[str, str], dict[str, str | None]], name: str, family: str
) -> None:
    said, expected = answers[name, family], SECTIONS[name][1][family]
    if "unavailable" in said:
        pytest.skip(f"vLLM cannot serve it here: {said['unavailable']}")
    if expected is None:
        assert said == dict.fromkeys(("doctor", "plan", "edge", "worker"))
    else:
        assert said["worker"] is None  # never asked: it was refused before
        for who in ("doctor", "plan", "edge"):
            text = said[who]
            assert text is not None and expected in text, f"{who}: {text}"
        assert str(said["edge"]).startswith("CompressError: ")


@pytest.mark.parametrize("column", ["kv", "weights"])
def test_the_documented_matrix_says_the_same(column: str) -> None:
    rows, expected = models_table.read(MATRIX), SECTIONS[column][1]
    assert rows.keys() == expected.keys() - OTHERS.keys()
    for family, cells in rows.items():
        state, _, reason = cells[column].partition(": ")
        assert (state == "refused") is (expected[family] is not None), family
        assert expected[family] is None or expected[family] in reason, family


def test_enough_families_are_compared(
    answers: dict[tuple[str, str], dict[str, str | None]],
) -> None:
    assert sum("unavailable" not in answers["kv", family] for family in FAMILIES) >= 20


def configure(model: Path, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    return EngineArgs(model=str(model), max_model_len=512, **engine).create_engine_config()


def kv(**section: Any) -> dict[str, Any]:
    return {"compress": {"kv": SNAP | section}}


def test_lora_is_refused_beside_bases(demo_model: Path) -> None:
    assert configure(demo_model, additional_config=kv(), enable_lora=True).lora_config
    cskv = {"compress": {"kv": CSKV}}
    with pytest.raises(CompressError, match="--enable-lora: bases are fitted to"):
        configure(demo_model, additional_config=cskv, enable_lora=True)


def test_a_window_is_one_only_for_longer_requests(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("mistral", sliding_window=512)
    config = configure(model, additional_config=kv())
    assert config.cache_config.sliding_window is None
    assert full_attention_layers(config.model_config.hf_text_config) == (0, 1)
    assert configure(model).cache_config.sliding_window == 512  # stock is left alone
    vllm_plugin.register()
    with pytest.raises(CompressError, match="no layer with full attention"):
        EngineArgs(model=str(model), additional_config=kv()).create_engine_config()


@pytest.mark.parametrize(("block_size", "window"), [(32, 256), (96, 288), (160, 320)])
def test_the_default_window_is_whole_blocks(demo_model: Path, block_size: int, window: int) -> None:
    from vllm_plugin.self_check import layouts

    config = configure(demo_model, additional_config=kv(), block_size=block_size)
    chosen = layouts(config, parse_settings(config.additional_config))
    assert chosen is not None and {layout.window for layout in chosen.values()} == {window}


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 2048),
        ({"model_max_length": 1024}, 1024),
    ],
)
def test_length_of_a_model_is_vllms(
    tiny_model: Callable[..., Path], fields: dict[str, Any], length: int
) -> None:
    model = tiny_model("llama", **fields)
    vllm_plugin.register()
    config = EngineArgs(model=str(model), skip_tokenizer_init=True).create_engine_config()
    assert config.model_config.max_model_len == length
    assert model_length(transformers.AutoConfig.from_pretrained(model)) == length
    assert model_length(transformers.MambaConfig()) is None
    assert TEXT["max_position_embeddings"] == 2048
