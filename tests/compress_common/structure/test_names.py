# SPDX-License-Identifier: Apache-2.0
"""The view of a language model inside another model: its config, its names, what lies beside it."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from compress_common.structure.names import Names, names_of
from compress_common.structure.structure import Structure
from compress_common.structure.wrapper import decoder_class, language_config
from quant_methods.formats.checkpoint_formats import compressed_tensors_config
from quant_methods.registry import build_method
from tests.support import wrapped

# How checkpoints name the layers, the head, and a linear of a tower that has the layers' own ends.
STYLES = {
    "llava": ("language_model.model.", "language_model.lm_head", "vision_tower.vision_model."),
    "saved by transformers 4.52": ("model.language_model.", "lm_head", "model.vision_tower."),
    "qwen2.5 vl": ("model.", "lm_head", "visual."),
    "tied": ("language_model.model.", None, "model.vision_tower."),
}


def config_of(family: str, **fields: Any) -> Any:
    kind, own, tower, _, _ = wrapped.FAMILIES[family]
    text = wrapped.TEXT | own | {"vocab_size": 512}
    made = getattr(transformers, kind)(text_config=text, vision_config=tower, **fields)
    return language_config(made)


def tensors_of(structure: Structure, style: str) -> list[str]:
    backbone, head, tower = STYLES[style]
    names = [
        f"{backbone}layers.{i}.{linear}.weight"
        for i in range(structure.depth)
        for linear in structure.names
    ]
    names += [f"{tower}layers.0.{linear}.weight" for linear in structure.names[:3]]
    return [*names, f"{backbone}embed_tokens.weight", *([f"{head}.weight"] if head else [])]


@pytest.mark.parametrize("style", STYLES)
def test_names_are_found_in_the_tensors(style: str) -> None:
    structure = replace(structure_of(config_of("llava")), towers=("visual", "vision_tower"))
    tensors, (backbone, head, tower) = tensors_of(structure, style), STYLES[style]
    names = names_of(tensors, structure)
    assert (
        names.inner(f"{backbone}layers.1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    )
    assert names.inner(f"{tower}layers.0.self_attn.q_proj.weight") is None
    for name in tensors:
        inner = names.inner(name)
        assert (inner is None) == name.startswith(tower)
        assert inner is None or names.outer(inner) == name
    if head is not None:
        assert names.inner(f"{head}.weight") == "lm_head.weight"


def test_names_of_a_language_model_are_its_own() -> None:
    structure = structure_of(transformers.LlamaConfig(**wrapped.TEXT, vocab_size=512))
    names = names_of(["model.layers.0.mlp.up_proj.weight"], structure)
    assert names == Names() and names.inner("any.name") == names.outer("any.name") == "any.name"


def test_names_of_a_model_without_a_head_begin_behind_its_class() -> None:
    structure = structure_of(transformers.LlamaConfig(**wrapped.TEXT, vocab_size=512))
    inside = ["layers.0.self_attn.q_proj.weight", "embed_tokens.weight", "norm.weight"]
    every = [*inside, "score.weight"]
    names = names_of(every, structure)
    for name in inside:
        assert names.inner(name) == f"model.{name}" and names.outer(f"model.{name}") == name
    assert names.inner("score.weight") is None
    assert names.head is None and names.outer("lm_head") == "lm_head"
    names = names_of([*every, "lm_head.weight"], structure)
    assert names.inner("lm_head.weight") == names.outer("lm_head.weight") == "lm_head.weight"
    assert names_of(["layers.0.attention.wq.weight", "norm.weight"], structure) == Names()


def test_two_language_models_are_refused() -> None:
    structure = structure_of(config_of("llava"))
    twice = tensors_of(structure, "llava") + tensors_of(structure, "saved by transformers 4.52")
    with pytest.raises(CompressError, match="2 language models: language_model.model., model.lang"):
        names_of(twice, structure)


@pytest.mark.parametrize("family", wrapped.FAMILIES)
def test_what_lies_beside_the_language_model_stays_at_16_bits(family: str) -> None:
    config = config_of(family)
    structure = structure_of(config)
    assert not structure.rotates and len(structure.layer(0).folds) == 4
    with torch.device("meta"):
        whole = transformers.AutoModelForImageTextToText.from_config(config.wrapper)
    ignore = compressed_tensors_config(
        build_method("rtn", {"group_size": 32}).settings.grids(config), config, {}
    )["ignore"]
    for name, module in whole.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        # As transformers names it, and as vLLM does.
        for called in (name, name.removeprefix("model."), f"language_model.{name}"):
            ignored = any(re.match(entry.removeprefix("re:"), called) for entry in ignore)
            assert ignored != name.startswith("model.language_model."), called


def test_the_whole_config_tells_what_holds_for_the_language_model() -> None:
    whole = config_of("qwen3 vl", tie_word_embeddings=True).wrapper
    whole.quantization_config = {"quant_method": "awq"}
    config = language_config(whole)
    assert config.tie_word_embeddings and whole.text_config is not config
    with pytest.raises(CompressError, match="already quantized .awq."):
        structure_of(config)
    text = transformers.LlamaConfig()
    assert language_config(text) is text


def test_a_rotation_and_quantized_embeddings_are_refused() -> None:
    config = config_of("mistral3")
    with pytest.raises(
        CompressError, match="vision_tower, multi_modal_projector add to the hidden"
    ):
        build_method("rsq", {"rotation": "both", "group_size": 32}).settings.grids(config)
    with pytest.raises(CompressError, match="never tested with a model around the language model"):
        build_method("rtn", {"embeddings": "int8"}).settings.embedding_grid(config)


def test_a_body_without_a_head_gets_one() -> None:
    config = config_of("qwen3 vl")
    model = decoder_class(config)._from_config(config).eval()
    tokens = torch.arange(8)[None]
    whole = transformers.AutoModelForImageTextToText.from_config(config.wrapper).eval()
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
        made = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(made, whole.generate(tokens, max_new_tokens=4, do_sample=False))


def test_a_parameter_beside_the_language_model_is_no_tower() -> None:
    _, own, tower, _, _ = wrapped.FAMILIES["llava"]
    text = wrapped.TEXT | own | {"vocab_size": 512}
    whole = transformers.LlavaNextConfig(text_config=text, vision_config=tower)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(whole)
    assert "model.image_newline" in dict(model.named_parameters())
    towers = structure_of(language_config(whole)).towers
    assert towers == ("vision_tower", "multi_modal_projector")


def test_a_model_around_that_transformers_does_not_have_is_refused() -> None:
    config = config_of("llava")
    config.wrapper = transformers.LlamaConfig()
    with pytest.raises(CompressError, match="the model around it, of model_type 'llama', is not"):
        structure_of(config)
