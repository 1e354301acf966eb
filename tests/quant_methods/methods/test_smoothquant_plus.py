# SPDX-License-Identifier: Apache-2.0
"""The method on small random models of every architecture covered."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import load_plan, save_plan
from quant_methods.methods.smoothquant_plus import PAPER
from quant_methods.registry import build_method
from tests.support.plans import TOKENS, load, with_plan

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def plan_for(model: torch.nn.Module, **settings: object) -> Plan:
    method = build_method("smoothquant_plus", {"group_size": 32} | settings)
    return method.plan(Blocks(model, structure_of(model.config), TOKENS))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_smoothing_alone_preserves_the_function(
    tiny_model: Callable[..., Path], arch: str, alpha: float
) -> None:
    folder = tiny_model(arch)
    exact = load(folder, torch.float32)
    with torch.no_grad():
        reference = exact(TOKENS).logits
        in_bf16 = load(folder, torch.bfloat16)(TOKENS).logits.float()
    rounding = (in_bf16 - reference).abs().max()  # what bf16 costs without any smoothing
    plan = plan_for(exact, alpha=alpha, folds="all", clip=False)
    smoothed = with_plan(exact, plan, rounded=False)
    assert (smoothed - reference).abs().max() < 1e-3 * reference.abs().max()
    model = load(folder, torch.bfloat16)
    plan = plan_for(model, alpha=alpha, folds="all", clip=False)
    smoothed = with_plan(model, plan, rounded=False)
    assert (smoothed - reference).abs().max() < 2.5 * rounding


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_search_picks_the_least_loss_and_covers_every_linear(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    model = load(tiny_model(arch), torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_for(model, rounding="nearest")
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    curve = plan.report["loss_curve"]
    assert plan.report["alpha"] == float(min(curve, key=curve.get))
    linears = structure_of(model.config).shapes
    assert len(plan.grids) == len(linears) * model.config.num_hidden_layers
    for name in plan.grids:
        weight = before[f"{name}.weight"]
        assert tuple(weight.shape) == linears[name.split(".", 3)[3]]


def test_plan_survives_its_file(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load(tiny_model("qwen2"), torch.bfloat16)
    plan = plan_for(model, folds="all")
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again.grids == plan.grids
    assert again.report == plan.report
    first, second = (load(tiny_model("qwen2"), torch.bfloat16) for _ in range(2))
    assert torch.equal(with_plan(first, plan, True), with_plan(second, again, True))


def test_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(CompressError, match="not a readable plan"):
        load_plan(tmp_path / "plan.safetensors")


def test_non_finite_activations_are_refused(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("llama"), torch.bfloat16)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(CompressError, match="block 1 gives NaN or infinity"):
        plan_for(model, rounding="nearest")


def test_unsupported_architecture_lists_everything() -> None:
    config = GPT2Config(quantization_config={"quant_method": "awq"})
    with pytest.raises(CompressError) as caught:
        structure_of(config)
    text = str(caught.value)
    assert "3 problems" in text
    assert (
        "model_type 'gpt2' is not supported: its layers have weights that are not linears" in text
    )
    assert "already quantized (awq)" in text


def test_what_is_smoothed_by_default() -> None:
    def smoothed(**settings: object) -> str:
        return build_method("smoothquant_plus", settings).settings.smoothed

    assert smoothed() == "none"
    assert smoothed(rounding="nearest") == smoothed(alpha=0.5) == smoothed(**PAPER) == "norms"
    assert smoothed(folds="all") == "all"
    with pytest.raises(CompressError, match="remove one of them"):
        build_method("smoothquant_plus", {"folds": "none", "alpha": 0.5})
    for idle in ({"search": "full"}, {"search": "full", "alpha": 0.5}):
        with pytest.raises(CompressError, match="`search` chooses"):
            build_method("smoothquant_plus", idle)


def test_settings_of_one_plan_have_one_identity() -> None:
    def identity(**settings: object) -> dict[str, object]:
        return build_method("smoothquant_plus", settings).settings.identity()

    assert identity() == identity(folds="none") == identity(search="coarse")
    assert identity(alpha=0.5) == identity(alpha=0.5, folds="norms")
    assert identity() != identity(alpha=0.5) != identity(folds="norms")


def test_nothing_is_observed_when_nothing_is_smoothed(tiny_model: Callable[..., Path]) -> None:
    plan = plan_for(load(tiny_model("llama"), torch.float32))
    assert not plan.vectors and not plan.shrinks and "alpha" not in plan.report
    clipped = plan_for(load(tiny_model("llama"), torch.float32), folds="none", rounding="nearest")
    assert not clipped.vectors and clipped.shrinks.keys() == clipped.grids.keys()
