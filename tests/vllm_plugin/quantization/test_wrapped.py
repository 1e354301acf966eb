# SPDX-License-Identifier: Apache-2.0
"""Int4 models of images and text answer an image as transformers does with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.formats.plan import Plan
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import QuantizedWeight
from quant_methods.planning import obtain_plan
from tests.support import wrapped
from vllm_plugin.settings import WeightSettings

SEEDS = [0, 1]
RTN: dict[str, Any] = {"group_size": 32}
FOLDED = RTN | {
    "alpha": 0.5,
    "folds": "all",
    "rounding": "nearest",
    "clip": False,
    "calibration": {"samples": 2, "length": 16},
}
# family, method, its settings, and whether it is quantized when an engine loads it
FAST = [("qwen3 vl", "rtn", RTN, True), ("mistral3", "smoothquant_plus", FOLDED, False)]
SLOW = [
    ("mistral3", "smoothquant_plus", FOLDED, True),
    *(
        (family, "rtn", RTN, at_load)
        for family in wrapped.FAMILIES
        for at_load in (True, False)
        if (family, at_load) != ("qwen3 vl", True)
    ),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def test_an_encoder_alone_is_not_quantized_at_load(tmp_path: Path, demo_model: Path) -> None:
    folder = wrapped.make("qwen3 vl", tmp_path / "model", demo_model)
    vllm_plugin.register()
    with pytest.raises(CompressError, match=r"--mm-encoder-only\) reads no decoder"):
        EngineArgs(str(folder), quantization="rtn", mm_encoder_only=True).create_engine_config()


@pytest.mark.parametrize(("family", "method", "settings", "at_load"), CASES)
def test_an_image_is_answered_as_by_transformers_with_the_plan(
    tmp_path: Path, demo_model: Path, family: str, method: str, settings: Any, at_load: bool
) -> None:
    folder = wrapped.make(family, tmp_path / "model", demo_model)
    checkpoint, request = Checkpoint(folder), WeightSettings(**settings).request(method, 1)
    engine: dict[str, Any] = {"dtype": "bfloat16"}
    if at_load:
        engine["quantization"] = method
        weights = settings | {"activations": "bf16"}
        engine["additional_config"] = {"compress": {"weights": weights}}
        served_from = folder
    else:
        served_from = tmp_path / "int4"
        quantize_checkpoint(folder, served_from, request)
        _check_written(checkpoint, Checkpoint(served_from))
        engine["additional_config"] = {"compress": {"weights": {"activations": "bf16"}}}
    answers = wrapped.answer(served_from, family, SEEDS, **engine)

    plan, _ = obtain_plan(checkpoint, request)
    rounded = _rounded(checkpoint, plan, tmp_path / "rounded")
    served = torch.tensor([answer["nats"] for answer in answers])
    wanted, plain = (_nats(model, folder, family, answers, SEEDS) for model in (rounded, folder))
    error = (served - wanted).abs().mean()
    assert error < 0.06
    assert error < 0.5 * (served - plain).abs().mean()  # 4 bits are far from 16
    swapped = _nats(rounded, folder, family, answers, SEEDS[::-1])
    assert (served - swapped).abs().mean() > 0.1  # the image matters


def _check_written(source: Checkpoint, written: Checkpoint) -> None:
    """Towers and projectors are bit-equal, and the language model's linears are packed."""
    before, after = dict(source.tensors()), dict(written.tensors())
    beside = [name for name in before if source.names.inner(name) is None]
    assert beside and all(torch.equal(before[name], after[name]) for name in beside)
    assert written.names == source.names
    packed = [name for name in after if name.endswith(".weight_packed")]
    assert len(packed) == 14 and all(source.names.inner(name) for name in packed)
    assert written.config["text_config"] == source.config["text_config"]


def _rounded(checkpoint: Checkpoint, plan: Plan, folder: Path) -> Path:
    """Write a checkpoint of the weights that a plan makes, dequantized."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, value in plan.transform(checkpoint.tensors(), torch.bfloat16):
        if isinstance(value, QuantizedWeight):
            tensors[f"{name}.weight"] = value.dequantize().float()
        else:
            tensors[name] = value.float().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    return folder


@torch.no_grad()
def _nats(
    model: Path, processor: Path, family: str, answers: list[dict[str, Any]], seeds: list[int]
) -> torch.Tensor:
    """Negative log probabilities of the answers' tokens, [answers, tokens]."""
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    prepare, found = AutoProcessor.from_pretrained(processor), []
    for answer, seed in zip(answers, seeds, strict=True):
        inputs = prepare(
            images=wrapped.picture(seed), text=wrapped.prompt(family), return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == answer["prompt"]
        tokens = torch.tensor([answer["tokens"]])
        for key, more in {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "token_type_ids": torch.zeros_like(tokens),
            "mm_token_type_ids": torch.zeros_like(tokens),
        }.items():
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], more], 1)
        logits = network(**inputs).logits[0, -len(tokens[0]) - 1 : -1]
        found.append(-logits.log_softmax(-1).gather(1, tokens[0][:, None])[:, 0])
    return torch.stack(found)
