# SPDX-License-Identifier: Apache-2.0
"""FireQ: exact folds, scales that the kernel keeps, codes nearest in its table, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.base import GridSettings
from quant_methods.formats.metadata import marker_of
from quant_methods.formats.packing import from_compressed_tensors, to_compressed_tensors
from quant_methods.formats.plan import Plan
from quant_methods.fp8 import FP8, converted, served_activation, served_scale
from quant_methods.grid import Grid, QuantizedWeight, fake_quantize, quantize
from quant_methods.registry import build_method
from quant_methods.roundings.gptq import GPTQ
from quant_methods.transforms.rope_keys import ScaleKeys, pair_factors
from quant_methods.transforms.weight_folds import WeightFolds
from tests.support.plans import TOKENS, load, with_plan

GRID = Grid(128, symmetric=True, activations="fp8")


def weight_of(seed: int, rows: int = 8, columns: int = 256) -> torch.Tensor:
    """Rows of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= 10 ** torch.randn(rows, 1, generator=generator)
    return weight * (1 + 20 * (torch.rand(weight.shape, generator=generator) > 0.99))


@given(st.integers(0, 1000), st.floats(0.01, 4), st.floats(-8, 1))
@settings(deadline=None)
def test_scales_are_kept_by_the_conversion(seed: int, spread: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = (10 ** (size + spread * torch.randn(4, 16, generator=generator))).clamp(1e-8, 100)
    scale = served_scale(raw)
    assert torch.equal(scale, scale.to(torch.bfloat16).float())
    assert torch.equal(served_scale(scale), scale)
    group, channel = converted(scale)
    torch.testing.assert_close(group.float() * channel, scale, rtol=2**-8, atol=0)
    largest = scale.amax(-1, keepdim=True).clamp(min=2**-9)
    large = raw > largest / 3500  # smaller ones have fewer digits
    assert ((scale - raw).abs() <= raw * 2**-4 * 1.05)[large].all()
    assert (scale > 0).all()


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_codes_are_the_nearest_of_the_table(seed: int) -> None:
    """Against a search through all 16 entries, each rounded to FP8 as the kernel's table is."""
    weight = weight_of(seed)
    rounded = quantize(weight, GRID)
    group, channel = converted(rounded.scale)
    entries = (torch.arange(-8, 8.0) * group.float()[..., None]).to(FP8).float()
    table = entries * channel[..., None]  # [N, groups, 16]
    distance = (weight.view(8, 2, 128, 1) - table[:, :, None]).abs()
    torch.testing.assert_close(
        (rounded.dequantize() - weight).abs(), distance.amin(-1).view(8, 256), rtol=1e-6, atol=0
    )
    assert torch.equal(fake_quantize(weight, GRID), rounded.dequantize())


def test_rows_of_zeros_and_of_tiny_weights_stay_finite() -> None:
    weight = weight_of(0)
    weight[0] = 0
    weight[1] *= 1e-9
    weight[2, 128:] *= 1e-9
    for rounded in (quantize(weight, GRID), GPTQ().round(weight, GRID, torch.eye(256))):
        assert torch.isfinite(rounded.dequantize()).all()
        assert int(rounded.q.max()) < 16
        assert (rounded.dequantize()[0] == 0).all()


def test_outputs_of_the_emulated_kernel() -> None:
    """Stored tensors, table, FP8 activations: all that the kernel rounds."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 512, generator=generator) * 0.02
    mix = torch.randn(128, 512, generator=generator)
    x = torch.randn(1024, 128, generator=generator) @ mix
    x += 3 * torch.randn(1024, 512, generator=generator)
    exact, gram = linear(x, weight), x.t() @ x / len(x)

    def error(rounded: QuantizedWeight) -> float:
        stored = to_compressed_tensors(rounded)
        assert set(stored) == {"weight_packed", "weight_scale", "weight_shape"}
        kernel = from_compressed_tensors(stored, GRID).dequantize()
        return ((linear(served_activation(x), kernel) - exact).norm() / exact.norm()).item()

    def blind(rounded: QuantizedWeight) -> QuantizedWeight:
        """As a tool writes it that does not know of the conversion."""
        return QuantizedWeight(rounded.q, rounded.scale, rounded.zero, GRID)

    plain = Grid(128, symmetric=True)
    nearest = [error(quantize(weight, GRID)), error(blind(quantize(weight, plain)))]
    assert nearest[0] < 0.98 * nearest[1]
    assert nearest[0] < 0.12
    gptq = [error(GPTQ().round(weight, GRID, gram))]
    gptq.append(error(blind(GPTQ().round(weight, plain, gram))))
    assert gptq[0] < 0.9 * gptq[1]
    assert gptq[0] < 0.5 * nearest[0]


@pytest.mark.parametrize("scale_keys", [False, True])
def test_folds_leave_the_logits(each_tiny_model: Path, scale_keys: bool) -> None:
    model = load(each_tiny_model, torch.float32)
    with torch.no_grad():
        reference = model(TOKENS).logits
    blocks = Blocks(model, structure_of(model.config), TOKENS)
    plan = Plan("folded", GridSettings(group_size=32).grids(model.config))
    WeightFolds().add(plan, blocks)
    assert len(plan.vectors) == 2 * 5  # a norm, gate, up, up's rows, down in each block
    if scale_keys:
        if model.config.model_type in ("qwen3", "gemma3_text"):
            with pytest.raises(CompressError, match="key_scale to null"):
                ScaleKeys(8).add(plan, blocks)
            return
        ScaleKeys(8).add(plan, blocks)
    folded = with_plan(model, plan, rounded=False)
    assert (folded - reference).abs().max() < 1e-3 * reference.abs().max()
    if scale_keys:  # the largest pair of every kind is now 8
        largest: dict[int, float] = {}
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.k_proj.register_forward_hook(
                lambda _, __, keys, index=index: largest.update(
                    {index: keys.view(-1, 2, 2, 16).norm(dim=2).amax(0)}
                )
            )
        with torch.no_grad():
            model(TOKENS)
        for found in largest.values():
            torch.testing.assert_close(found, torch.full((2, 16), 8.0), rtol=1e-3, atol=0)


@given(st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_pairs_have_one_factor_and_means_become_equal(seed: int) -> None:
    largest = torch.rand(2, 8, generator=torch.Generator().manual_seed(seed)) * 10
    factors = pair_factors(largest, 8).view(2, 2, 8)
    assert torch.equal(factors[:, 0], factors[:, 1])
    torch.testing.assert_close(factors[:, 0] * largest, torch.full((2, 8), 8.0))


def test_mean_weights_of_the_mlp_become_equal(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("llama"), torch.float32)
    plan = Plan("folded", GridSettings(group_size=32).grids(model.config))
    WeightFolds().add(plan, Blocks(model, structure_of(model.config), TOKENS))
    for names in (("gate_proj", "up_proj"), ("down_proj",)):
        weights = []
        for name in names:
            full = f"model.layers.1.mlp.{name}"
            weight = model.get_submodule(full).weight
            weights.append(weight * plan.vectors[f"{full}.input"])
        mean = torch.cat(weights).abs().mean(0)
        torch.testing.assert_close(mean, mean[:1].expand_as(mean), rtol=2e-2, atol=0)


def planned(model: torch.nn.Module, **given_settings: Any) -> Plan:
    blocks = Blocks(model, structure_of(model.config), TOKENS)
    return build_method("fireq", given_settings).plan(blocks)


def test_the_plan_is_that_of_the_grid(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2")
    model = load(folder, torch.float32)
    plan = planned(model, rounding="nearest")
    assert marker_of(Checkpoint(folder), plan)["values_scaled"]  # keys are
    others = planned(model, rounding="nearest", key_scale=None)
    assert not marker_of(Checkpoint(folder), others)["values_scaled"]
    assert set(plan.grids.values()) == {GRID}
    assert len(plan.grids) == 14
    assert {name.rpartition(".")[2] for name in plan.vectors} == {"weight", "input", "output"}
    assert not planned(model, folds=False, key_scale=None).vectors


@pytest.mark.parametrize(
    ("arch", "given_settings", "config", "expected"),
    [
        ("qwen3", {}, {}, "qwen3 normalizes queries and keys.*key_scale"),
        ("llama", {"tensor_parallel": 2}, {}, "tensor parallel size 1"),
        ("llama", {}, {"dtype": torch.float16}, "is float16; convert it"),
        (
            "llama",
            {},
            {"hidden_size": 96, "intermediate_size": 96},
            "multiples of 128.*hidden size 96, intermediate size 96",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    tiny_model: Callable[..., Path],
    arch: str,
    given_settings: dict[str, Any],
    config: dict[str, Any],
    expected: str,
) -> None:
    kind = load(tiny_model(arch), torch.float32).config
    kind.dtype = torch.bfloat16
    for name, value in config.items():
        setattr(kind, name, value)
    with pytest.raises(CompressError, match=expected):
        build_method("fireq", given_settings).settings.grids(kind)


@pytest.mark.parametrize("given_settings", [{"bits": 3}, {"group_size": 64}, {"symmetric": False}])
def test_settings_that_the_kernel_fixes(given_settings: dict[str, Any]) -> None:
    with pytest.raises(CompressError, match=next(iter(given_settings))):
        build_method("fireq", given_settings)
