# SPDX-License-Identifier: Apache-2.0
"""Rotations leave the function alone, and fit together with smoothing, Gram matrices and files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.base import GridSettings
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import load_plan, plan_digest, save_plan
from quant_methods.registry import build_method
from quant_methods.transforms.base import Transform
from quant_methods.transforms.rotation import RotateHeads, RotateResidual, hadamard
from tests.support.plans import TOKENS, load, with_plan

BOTH = (RotateHeads(), RotateResidual())


def plan_of(
    model: torch.nn.Module, transforms: tuple[Transform, ...], smooth: bool = False
) -> Plan:
    blocks = Blocks(model, structure_of(model.config), TOKENS)
    if smooth:
        settings = {"group_size": 32, "alpha": 0.5, "folds": "all", "clip": False}
        plan = build_method("smoothquant_plus", settings).plan(blocks)
    else:
        plan = Plan("rotated", GridSettings(group_size=32).grids(model.config))
    for transform in transforms:
        transform.add(plan, blocks)
    return plan


@pytest.mark.parametrize("size", [1, 32, 96, 576])
def test_hadamard_is_orthogonal(size: int) -> None:
    matrix = hadamard(size, seed=3).double()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size).double(), atol=1e-5, rtol=0)
    if size == 32:
        assert (matrix.abs() == matrix.abs()[0, 0]).all()


@pytest.mark.parametrize("smooth", [False, True])
def test_logits_stay_in_fp32(each_tiny_model: Path, smooth: bool, tmp_path: Path) -> None:
    model = load(each_tiny_model, torch.float32)
    with torch.no_grad():
        reference = model(TOKENS).logits
    transforms = BOTH[:1] if "gemma3" in each_tiny_model.name else BOTH
    plan = plan_of(model, transforms, smooth)
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert plan_digest(again) == plan_digest(plan)
    turned = with_plan(model, again, rounded=False)
    assert (turned - reference).abs().max() < 1e-3 * reference.abs().max()


def test_undone_weights_and_turned_grams_fit(tiny_model: Callable[..., Path]) -> None:
    """The error of a rounded weight is the same in the original and in the turned space."""
    model = load(tiny_model("qwen2"), torch.float32)
    plan = plan_of(model, BOTH, smooth=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        linear, weight = f"model.layers.1.{name}", model.model.layers[1].get_submodule(name).weight
        x = torch.randn(512, weight.shape[1], generator=generator)
        gram = x.t() @ x / len(x)
        turned = plan.smoothed(linear, weight)
        rounded = turned + 0.01 * torch.randn(turned.shape, generator=generator)
        torch.testing.assert_close(plan.unfolded(linear, turned), weight, atol=1e-4, rtol=1e-4)
        change = rounded - turned
        inside = torch.trace(change @ plan.transformed_gram(linear, gram) @ change.t())
        if name.endswith(("down_proj", "o_proj")):  # their outputs are only turned
            outside = (x @ (plan.unfolded(linear, rounded) - weight).t()).square().sum() / len(x)
            torch.testing.assert_close(inside, outside, rtol=1e-3, atol=1e-6)


def test_norms_behind_attention_cannot_be_passed(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(CompressError, match="gemma3_text has norms behind.*rotate heads alone"):
        plan_of(load(tiny_model("gemma3"), torch.float32), BOTH)
