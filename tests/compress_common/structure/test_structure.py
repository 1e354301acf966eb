# SPDX-License-Identifier: Apache-2.0
"""Structures and folds of decoders that the package does not know by name."""

import json
import re
import time
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import logits_of
from compress_common.calibration.residency import widen
from compress_common.errors import CompressError
from compress_common.structure.derive import build, derive, known_structure, structure_of
from compress_common.structure.layer_structure import Fold
from compress_common.structure.norms import norm_offset, passes_rotation
from compress_common.structure.structure import Structure
from quant_methods.formats.checkpoint_formats import patterns
from quant_methods.transforms.prove import Proof, proved_folds
from tests.conftest import MORE_MODELS, SHARED, TINY_MODELS

TOKENS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(0))
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
DENSE: dict[str, tuple[str, dict[str, Any]]] = (
    TINY_MODELS
    | MORE_MODELS
    | {
        "apertus": ("ApertusConfig", {}),
        "arcee": ("ArceeConfig", {}),
        "biogpt": ("BioGptConfig", {}),
        "cohere2": ("Cohere2Config", SLIDING),
        "gemma": ("GemmaConfig", {}),
        "gemma2": ("Gemma2Config", SLIDING),
        "helium": ("HeliumConfig", {}),
        "jais2": ("Jais2Config", {}),
        "ministral3": ("Ministral3Config", {}),
        "nanochat": ("NanoChatConfig", {}),
        "olmo": ("OlmoConfig", {}),
        "olmo3": ("Olmo3Config", SLIDING),
        "opt": ("OPTConfig", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
        "phi": ("PhiConfig", {}),
        "vaultgemma": ("VaultGemmaConfig", SLIDING),
    }
)
FAST = ("exaone4", "gemma3", "nemotron", "phi3", "qwen2", "starcoder2")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
VALUES = ("self_attn.v_proj", ("self_attn.o_proj",))
UP = ("mlp.up_proj", ("mlp.down_proj",))
LLAMA = {
    ("input_layernorm", QKV),
    VALUES,
    ("post_attention_layernorm", GATE_UP),
    UP,
}
# What is folded, where it is not as in Llama.
FOLDS: dict[str, set[tuple[str, tuple[str, ...]]]] = {
    "apertus": {("attention_layernorm", QKV), VALUES, ("feedforward_layernorm", ("mlp.up_proj",))},
    "arcee": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.up_proj",))},
    "biogpt": {
        ("self_attn_layer_norm", QKV),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
    },
    "cohere": {("input_layernorm", QKV + GATE_UP), VALUES, UP},
    "cohere2": {("input_layernorm", QKV + GATE_UP), VALUES, UP},
    "exaone4": {VALUES, UP},  # norms stand behind attention and MLP
    "gemma2": {("input_layernorm", QKV), VALUES, ("pre_feedforward_layernorm", GATE_UP), UP},
    "gemma3": {("input_layernorm", QKV), VALUES, ("pre_feedforward_layernorm", GATE_UP), UP},
    "glm": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.gate_up_proj",))},
    "glm4": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.gate_up_proj",))},
    "jais2": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.up_proj",))},
    "nanochat": {VALUES},  # norms without weights
    "nemotron": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.up_proj",))},
    "olmo": {VALUES, UP},  # norms without weights
    "olmo2": {VALUES, UP},
    "olmo3": {VALUES, UP},
    "opt": {
        ("self_attn_layer_norm", QKV),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
    },
    "phi": {  # not fc1 into fc2: its GELU is a product, which running it shows
        ("input_layernorm", (*QKV, "mlp.fc1")),
        ("self_attn.v_proj", ("self_attn.dense",)),
    },
    "phi3": {
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    },
    "starcoder2": {("input_layernorm", QKV), VALUES, ("post_attention_layernorm", ("mlp.c_fc",))},
    "vaultgemma": {("input_layernorm", QKV), VALUES, ("pre_feedforward_layernorm", GATE_UP), UP},
}


def config_of(name: str, **fields: Any) -> Any:
    kind, own = DENSE[name]
    tokens = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, kind)(**(SHARED | tokens | own | fields))


def model_of(config: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # fresh norms are all one, fresh biases all zero
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pairs(folds: tuple[Fold, ...]) -> set[tuple[str, tuple[str, ...]]]:
    return {(fold.producer, fold.consumers) for fold in folds}


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(DENSE)],
)
def test_folds_of_a_decoder_leave_its_logits(name: str) -> None:
    config = config_of(name)
    started = time.process_time()
    structure = structure_of(config)
    model = model_of(config)
    blocks = Blocks(model, structure, TOKENS)
    found = proved_folds(blocks)
    assert time.process_time() - started < 12
    assert len(found) == 2
    assert [pairs(folds) for folds in found] == [FOLDS.get(name, LLAMA)] * 2
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    linears = {
        name.removeprefix(f"{structure.layers}.1."): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(f"{structure.layers}.1.")
    }
    assert structure.shapes == linears
    _check_logits(model, structure, found)


@torch.no_grad()
def _check_logits(
    model: torch.nn.Module, structure: Structure, found: list[tuple[Fold, ...]]
) -> None:
    """Fold by hand what was found, a vector for each fold of each layer, and compare logits."""
    before = model(TOKENS).logits
    for index, folds in enumerate(found):
        layer = model.get_submodule(f"{structure.layers}.{index}")
        for fold in folds:
            producer = layer.get_submodule(fold.producer)
            vector = torch.rand(producer.weight.shape[0]) + 0.5
            producer.weight.copy_(
                (producer.weight + fold.offset) / (vector if fold.from_norm else vector[:, None])
                - fold.offset
            )
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(vector)
            heads = vector.view(-1, 1, fold.head_dim).expand(-1, fold.repeat, -1).reshape(-1)
            for name in fold.consumers:
                layer.get_submodule(name).weight.mul_(heads)
    after = model(TOKENS).logits
    assert (after - before).abs().max() < 2e-4 * before.abs().max()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {}, "0 times through transformers' AttentionInterface"),
    "gpt2": ("GPT2Config", {}, "weights that are not linears: attn.c_attn.weight"),
    "gpt_neox": ("GPTNeoXConfig", {}, "head by head"),
    "gptj": ("GPTJConfig", {}, "does not go through transformers' AttentionInterface"),
    "mamba2": ("Mamba2Config", {}, "not linears: mixer.conv1d.weight"),
    "deepseek": ("DeepseekV3Config", {"num_hidden_layers": 4}, "multi-head latent attention"),
    "t5": ("T5Config", {}, "has no language model for T5Config"),
    "bert": ("BertConfig", {}, "it is an encoder, which predicts masked tokens"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_quantized_is_refused_by_name(name: str) -> None:
    kind, fields, reason = REFUSED[name]
    config = getattr(transformers, kind)(**fields)
    with pytest.raises(CompressError, match=reason) as caught:
        structure_of(config)
    assert f"model_type {config.model_type!r} is not supported: " in str(caught.value)
    assert known_structure(config) is None


def test_a_quantized_checkpoint_is_known_and_not_quantized_again() -> None:
    config = config_of("llama", quantization_config={"quant_method": "awq"})
    with pytest.raises(CompressError, match=r"already quantized \(awq\)"):
        structure_of(config)
    assert known_structure(config) == structure_of(config_of("llama"))


def test_layers_that_differ_are_refused() -> None:
    model = build(config_of("llama"))
    layers = model.get_submodule("model.layers")
    layers[1].mlp.up_proj = torch.nn.Linear(128, 256, bias=True, device="meta")
    layers[1].mlp.gate_proj = torch.nn.Linear(128, 256, bias=False, device="meta")
    assert derive(model, config_of("llama")).depth == 2  # a bias makes no difference
    layers[1].self_attn.o_proj = torch.nn.Sequential(
        torch.nn.Linear(128, 128, device="meta"), torch.nn.Linear(128, 128, device="meta")
    )
    with pytest.raises(CompressError, match="layers 0 and 1 have different linears"):
        derive(model, config_of("llama"))


def test_a_linear_that_runs_twice_is_refused() -> None:
    model = build(config_of("llama"))
    layer = model.get_submodule("model.layers")[0]
    layer.mlp.up_proj = layer.mlp.gate_proj
    with pytest.raises(CompressError, match="linears that do not run once in a pass"):
        derive(model, config_of("llama"))


@pytest.mark.parametrize(
    ("producer", "consumers", "offset"),
    [
        ("input_layernorm", QKV[:2], 0.0),  # v_proj reads it too
        ("input_layernorm", QKV, 1.0),
        ("mlp.gate_proj", ("mlp.down_proj",), 0.0),  # through the activation
        ("self_attn.q_proj", ("self_attn.o_proj",), 0.0),
    ],
)
def test_a_wrong_fold_is_not_proved(
    producer: str, consumers: tuple[str, ...], offset: float
) -> None:
    config = config_of("mistral", num_key_value_heads=4)
    structure = structure_of(config)
    blocks = Blocks(model_of(config), structure, TOKENS)
    proof = Proof(blocks, 0, blocks.inputs()[:1])
    wrong = Fold(producer, consumers, producer.endswith("norm"), offset)
    assert not proof.proves(structure.shapes, (wrong,))
    assert proof.proves(structure.shapes, structure.layer(0).folds)


def test_an_unproved_fold_is_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("llama")
    model, structure = model_of(config), structure_of(config)
    layer = model.get_submodule("model.layers")[1]
    down = layer.mlp.down_proj
    layer.mlp.act_fn = torch.nn.Sigmoid()
    down.register_forward_pre_hook(lambda _, args: (torch.tanh(args[0]),))
    first, second = proved_folds(Blocks(model, structure, TOKENS))
    assert pairs(first) == LLAMA
    assert pairs(second) == LLAMA - {UP}
    assert "model.layers.1.mlp.up_proj is not folded into mlp.down_proj" in caplog.text


def test_what_a_norm_does_is_told_by_running_it() -> None:
    plain = build(config_of("llama")).get_submodule("model.norm")
    gemma = build(config_of("gemma3")).get_submodule("model.norm")
    mean = build(config_of("nemotron")).get_submodule("model.norm")
    assert [norm_offset(norm) for norm in (plain, gemma, mean)] == [0.0, 1.0, 1.0]
    assert [passes_rotation(norm) for norm in (plain, gemma, mean)] == [True, True, False]


def test_a_config_is_followed_once() -> None:
    config = LlamaConfig(**SHARED, vocab_size=512)
    first = structure_of(config)
    assert structure_of(LlamaConfig(**SHARED, vocab_size=512)) is first
    config.intermediate_size = 384
    assert structure_of(config).shapes["mlp.up_proj"] == (384, 128)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("opt", {}),
    ],
)
def test_logits_are_the_models(name: str, fields: dict[str, Any]) -> None:
    config = config_of(name, **fields)
    model, structure = model_of(config), structure_of(config)
    outputs: list[Any] = []
    last = model.get_submodule(f"{structure.layers}.{structure.depth - 1}")
    last.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        expected = model(TOKENS).logits
        hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        assert torch.allclose(logits_of(model, structure)(hidden), expected, atol=1e-5)
    plain = model.get_output_embeddings()(hidden)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_loss_that_cannot_be_measured_is_refused() -> None:
    config = config_of("olmo")  # its last norm has no weight
    with pytest.raises(CompressError, match="no norm with a weight in front of its head"):
        logits_of(model_of(config), structure_of(config))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_patterns_match_some_linears_and_no_others(name: str) -> None:
    structure = structure_of(config_of(name))
    every = [linear for unit in structure.all_units.values() for linear in unit]
    for count in range(1, len(every) + 1):
        chosen = every[::2][:count] + every[1::2][: max(0, count - len(every[::2]))]
        found = [pattern.removeprefix("re:") for pattern in patterns(chosen, structure)]
        matched = [n for n in every if any(re.match(pattern, n) for pattern in found)]
        assert sorted(matched) == sorted(chosen)


def test_a_widened_norm_is_copied_with_its_own_forward() -> None:
    config = config_of("llama")
    model, structure = model_of(config).to(torch.bfloat16), structure_of(config)
    assert structure.norm is not None
    norm = model.get_submodule(structure.norm)
    widen(model, structure, torch.float32)
    assert norm_offset(norm) == 0.0 and passes_rotation(norm)
