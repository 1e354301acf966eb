# SPDX-License-Identifier: Apache-2.0
"""``profile`` and ``calibrate-kv`` measure the language model inside a model of images and text."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import load_model
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from tests.support import wrapped
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, attention_of
from vllm_plugin.commands.profiling.kv_bases import make_bases
from vllm_plugin.commands.profiling.kv_profile import make_profile
from vllm_plugin.kv_cache.budget import bases_of, layouts_of
from vllm_plugin.settings import KVSettings

TEXT = CalibrationSettings(samples=4, length=48)
# Where layers are in different places, have M-RoPE, or have windows in some layers.
FAMILIES = ("qwen3 vl", "mistral3", "gemma3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wrapped")
    return {family: wrapped.make(family, root / family, demo_model) for family in FAMILIES}


def config_of(folder: Path) -> object:
    return Checkpoint(folder).hf_config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_is_that_of_the_whole_model_on_text(
    models: dict[str, Path], demo_model: Path, tmp_path: Path, family: str
) -> None:
    folder = models[family]
    made, _ = make_profile(str(folder), Fraction(1, 2), TEXT)
    assert made.layers == ((1,) if family == "gemma3" else (0, 1))
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    tokens = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = whole(input_ids=tokens, output_attentions=True).attentions
    expected = torch.stack([dense[layer].mean(1).sum(1)[0] for layer in made.layers])
    measured = load_model(Checkpoint(folder), torch.float32, attn_implementation=ATTENTION)
    found = attention_of(measured, {"input_ids": tokens}, made.layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    file = tmp_path / "profile.json"
    made.save(file)
    settings = KVSettings(policy="snap_kv", profile=file)
    int4 = tmp_path / "int4"
    quantize_checkpoint(folder, int4, PlanRequest(method="rtn", settings={"group_size": 32}))
    for served in (folder, int4):  # the int4 checkpoint names the weights that it was made from
        layouts = layouts_of(settings, 32, str(served), config_of(served))
        assert tuple(layouts) == made.layers
    with pytest.raises(CompressError, match="made for"):  # a model with other weights
        other = wrapped.make(family, tmp_path / "other", demo_model, initializer_range=0.2)
        layouts_of(settings, 32, str(other), config_of(other))


def test_bases_are_those_of_the_language_model(models: dict[str, Path], tmp_path: Path) -> None:
    folder, file = models["mistral3"], tmp_path / "bases.safetensors"
    made, _ = make_bases(str(folder), Fraction(1, 2), TEXT)
    made.save(file)
    settings = KVSettings(policy="cskv", bases=file)
    assert bases_of(settings, str(folder), config_of(folder)).ranks(1) == made.ranks(1)


def test_bases_of_keys_with_m_rope_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(CompressError, match="rotated by M-RoPE, by three positions of each token"):
        make_bases(str(models["qwen3 vl"]), Fraction(1, 2), TEXT)
