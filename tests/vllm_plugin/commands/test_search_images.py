# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress search --method luq --images``: layers are ranked on text and images mixed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from quant_methods.calibration.images import ImageSettings
from tests.support import wrapped
from tests.vllm_plugin.commands.test_profile_images import with_template
from tests.vllm_plugin.commands.test_search import QUICK
from vllm_plugin.commands.profiling.hf_images import HFImageModel
from vllm_plugin.commands.profiling.image_outputs import image_outputs

BUDGET = ("--budget", 6.5, "--target", "cuda", "--out", "bits.json")
MIX = ("--images", "made", "--image-samples", 2)
FEW = ("--set", "tokens=40", "--set", "clusters=6")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    folder = wrapped.make("qwen3 vl", tmp_path_factory.mktemp("model"), demo_model)
    return with_template(folder, "qwen3 vl")


def test_outputs_are_those_of_the_whole_model(qwen: Path) -> None:
    """With M-RoPE, and with features of images that are added between layers."""
    subject = HFImageModel(str(qwen), ImageSettings(samples=2), 1)
    made = image_outputs(subject, 30)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(qwen, dtype=torch.float32)
    layers, wanted = whole.get_decoder().layers, []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: wanted.append(output[0]))
    for inputs in subject.inputs(whole, lambda *_: None):
        with torch.no_grad():
            whole(**inputs)
    chosen = torch.randperm(subject.token_count, generator=torch.Generator().manual_seed(0))[:30]
    first = len(wanted[0])  # tokens of the first chat
    chosen = torch.cat((chosen[chosen < first], chosen[chosen >= first]))
    assert 0 < int((chosen < first).sum()) < 30
    for at, outputs in enumerate(made):
        every = torch.cat(wanted[at :: len(layers)])
        torch.testing.assert_close(outputs.float(), every[chosen], rtol=0.05, atol=0.05)


def test_search_on_a_mix(
    run: Callable, qwen: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    asked = ("search", qwen, *BUDGET, "--method", "luq", "--text", text, *QUICK)
    reports = []
    for more in ((), MIX, MIX):
        code, _, errors = run(*asked, *FEW, *more)
        assert code == 0, errors
        reports.append(json.loads(Path("bits.json").read_text())["report"])
    plain, mixed, again = reports
    assert plain["images"] is None and plain["search"]["mean_rank"]
    assert mixed["images"] == {"source": "made", "samples": 2, "seed": 0}
    assert mixed["settings"]["image_share"] == 0.5
    assert mixed == again


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "probe", *MIX), "probe does not look at images; leave --images out"),
        (("--method", "luq", "--image-samples", 2), "give --images too"),
        (("--method", "luq", *MIX), "1024 are wanted; raise --image-samples, or lower `tokens`"),
        (("--method", "luq", "--images", "none.jsonl"), "none.jsonl is not a file; give 'made'"),
        (("--method", "luq", *MIX, "--set", "image_share=1"), "image_share"),
    ],
)
def test_one_error_before_any_work(
    run: Callable, qwen: Path, tmp_path: Path, options: tuple, expected: str
) -> None:
    code, output, errors = run("search", qwen, *BUDGET, *options)
    assert code == 1 and not output
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert expected in line
    assert not list(Path().iterdir())


def test_a_model_of_text_alone_is_refused(run: Callable, tiny_model: Callable[..., Path]) -> None:
    code, _, errors = run("search", tiny_model("qwen2"), *BUDGET, "--method", "luq", *MIX)
    assert code == 1 and "a model of text alone; leave --images out" in errors
