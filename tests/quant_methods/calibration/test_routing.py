# SPDX-License-Identifier: Apache-2.0
"""Calibration of routed experts, and their weights against a float64 reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import _keep_mapped, load_model
from compress_common.errors import CompressError
from compress_common.progress import silent
from compress_common.structure.derive import structure_of
from quant_methods.calibration.routing import routed, routing_kept, tokens_for
from quant_methods.formats.plan import Plan
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import Grid
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.roundings.experts import round_experts
from quant_methods.transforms.smoothed_decoder import SmoothedDecoder
from tests.support.peak import Peak

TEXT = {"samples": 8, "length": 32}
GROUP = {"group_size": 32}


def made(folder: Path, method: str = "smoothquant_plus", **settings: Any) -> Plan:
    request = PlanRequest(method=method, settings=GROUP | settings, calibration=TEXT)
    return obtain_plan(Checkpoint(folder), request)[0]


@given(
    chosen=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
    enough=st.integers(1, 60),
)
def test_an_expert_is_shown_its_tokens_and_others_up_to_enough(
    chosen: list[tuple[int, int]], enough: int
) -> None:
    places = torch.tensor(chosen)
    own = [index for index, pair in enumerate(chosen) if 2 in pair]
    tokens, went = tokens_for(places, 2, enough)
    assert went == len(own)
    assert tokens.tolist()[:went] == own
    assert len(set(tokens.tolist())) == len(tokens) == max(went, min(enough, len(chosen)))


def test_gptq_reaches_every_expert(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2_moe", num_experts=16)
    kind = structure_of(Checkpoint(folder).hf_config).layer(0)
    assert len(kind.routed) == 48
    plans = {experts: made(folder, experts=experts) for experts in ("routed", "all")}
    for experts, plan in plans.items():
        assert set(plan.codes) == set(plan.grids)
        assert {f"model.layers.1.{name}" for name in kind.names} <= set(plan.codes)
        assert {plan.grids[f"model.layers.1.{name}"] for name in kind.routed} == {Grid(32)}
        assert not any(f"model.layers.1.{name}" in plan.grids for name in kind.kept)
        for counts in plan.report["experts"].values():
            # 256 tokens go to 2 of 16 experts each: some get fewer than 4 groups of 32.
            assert counts["median"] < 128
            assert counts["shown_other_tokens"] > (15 if experts == "all" else 0)
        routing = plan.report["routing"]
        assert routing["tokens"] == 256
        assert set(routing["by_layer"]) == {"0", "1"}
        assert 0.2 < routing["unchanged"] < 1
    nearest = made(folder, "rtn")
    state = dict(Checkpoint(folder).tensors())
    for name in (f"model.layers.1.{name}" for name in kind.routed):
        weight = state[f"{name}.weight"]
        codes = [
            plan.quantized(name, weight, torch.bfloat16).q
            for plan in (nearest, plans["routed"], plans["all"])
        ]
        assert not torch.equal(codes[0], codes[1])
        assert not torch.equal(codes[1], codes[2])


def test_clipping_of_an_expert_follows_the_tokens_that_go_to_it(
    tiny_model: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint(tiny_model("qwen2_moe", num_experts=16))
    structure = structure_of(checkpoint.hf_config)
    kind = structure.layer(0)
    # 896 tokens, 2 of 16 experts each: some get fewer than the 128 that are enough.
    tokens = torch.randint(3, 512, (28, 32), generator=torch.Generator().manual_seed(1))
    blocks = Blocks(load_model(checkpoint, None), structure, tokens)
    grids = {f"{blocks.prefix(0)}{name}": Grid(32) for name in kind.names}
    found = {
        everyone: SmoothedDecoder(blocks, grids, "none", silent, everyone).statistics[0].mean_square
        for everyone in (False, True)
    }
    with blocks.resident(0), routed(blocks, 0) as seen:
        blocks.run(0, blocks.inputs())
    assert seen.hidden is not None
    chosen, everything = torch.cat(seen.chosen), seen.hidden.float().square().mean(0)
    own = few = 0
    for expert in range(16):
        gate = f"mlp.experts.{expert}.gate_proj"
        assert kind.first_routed[f"mlp.experts.{expert}.up_proj"] == gate
        mine = (chosen == expert).any(-1)
        expected = everything
        if mine.sum() >= 128:
            expected, own = seen.hidden[mine].float().square().mean(0), own + 1
        else:
            few += 1
        assert torch.allclose(found[False][gate], expected, rtol=1e-4)
        assert torch.allclose(found[True][gate], everything, rtol=1e-4)
    assert few, "no expert that got few tokens"
    assert own, "no expert that got enough"


def test_inputs_of_experts_are_held_once(tiny_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(tiny_model("qwen3_moe"))
    structure = structure_of(checkpoint.hf_config)
    tokens = torch.randint(3, 512, (64, 32), generator=torch.Generator().manual_seed(1))
    blocks = Blocks(load_model(checkpoint, None), structure, tokens, chunk_tokens=64)
    hidden = blocks.inputs()
    shown: list[torch.Tensor] = []
    experts = blocks.layers[1].get_submodule("mlp.experts")
    experts.register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    with blocks.resident(1), routed(blocks, 1) as seen:
        blocks.run(1, hidden)
    assert len(shown) == 32
    assert seen.hidden is not None and torch.equal(seen.hidden, torch.cat(shown))
    grids = {f"{blocks.prefix(1)}{name}": Grid(32) for name in structure.layer(1).routed}
    size = 0

    def nothing(names: tuple[str, ...], grams: dict[str, torch.Tensor], count: int) -> dict:
        return {}

    with Peak() as peak:
        options = (None, "routed", nothing)
        round_experts(Plan("none", grids), blocks, 1, seen, *options)
        size = peak.most
    assert size < 0.7 * seen.hidden.nbytes  # no second copy of them


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
def test_expert_weights_are_those_of_a_float64_reference(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    checkpoint = Checkpoint(tiny_model(arch))
    plan = made(checkpoint.folder, rounding="nearest", clip=False, folds="all", alpha=0.5)
    structure = structure_of(checkpoint.hf_config)
    state = dict(checkpoint.tensors())
    kind = structure.layer(1)
    for name in sorted(kind.routed):
        full = f"model.layers.1.{name}"
        weight = state[f"{full}.weight"]
        found = plan.quantized(full, weight, torch.bfloat16).dequantize().double()
        folded = weight.double()
        assert f"{full}.output" not in plan.vectors
        if name.rpartition(".")[2] in ("down_proj", "w2"):
            assert f"{full}.input" not in plan.vectors
        else:
            folded = folded * plan.vectors[f"{full}.input"].double()
        groups = folded.view(len(folded), -1, 32)
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).bfloat16().double()
        zero = (-low / scale).round().clamp(0, 15)
        codes = ((groups / scale).round() + zero).clamp(0, 15)
        wanted = ((codes - zero) * scale).view_as(folded)
        assert (found == wanted).double().mean() > 0.999  # but for ties
        assert ((found - wanted).abs() <= scale.expand_as(groups).reshape_as(found) * 1.01).all()
    # The gate is folded like its neighbors, and stays at 16 bits.
    for gate in kind.kept:
        full = f"model.layers.1.{gate}"
        vector = plan.vectors[f"{full}.input"]
        first = min(kind.routed).rpartition(".")[0]
        of_expert = plan.vectors[f"model.layers.1.{first}.{_gate(arch)}.input"]
        assert torch.equal(vector, of_expert)
        served = plan._apply(f"{full}.weight", state[f"{full}.weight"], torch.bfloat16)[1]
        assert isinstance(served, torch.Tensor)
        assert torch.allclose(served.float(), state[f"{full}.weight"].float() * vector, rtol=2**-8)


def _gate(arch: str) -> str:
    return "w1" if arch == "mixtral" else "gate_proj"


def test_routing_of_an_unchanged_model_is_kept(tiny_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(tiny_model("qwen3_moe"))
    model, structure = load_model(checkpoint, None), structure_of(checkpoint.hf_config)
    tokens = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    blocks = Blocks(model, structure, tokens)
    kept = routing_kept(Plan("none", {}), blocks)
    assert kept == {"tokens": 128, "unchanged": 1.0, "by_layer": {"0": 1.0, "1": 1.0}}
    fine = {name: Grid(32, bits=8) for name in structure.all_units["model.layers.0.experts"]}
    coarse = {name: Grid(32, bits=2) for name in fine}
    shares = [routing_kept(Plan("rtn", grids), blocks)["by_layer"] for grids in (fine, coarse)]
    assert shares[0]["0"] == shares[1]["0"] == 1  # the experts come behind the gate
    assert shares[1]["1"] < shares[0]["1"]


def test_a_loaded_model_has_the_weights_of_the_names_in_its_checkpoint(
    tiny_model: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint(tiny_model("mixtral"))
    model = load_model(checkpoint, None)
    state = dict(checkpoint.tensors())
    structure = structure_of(checkpoint.hf_config)
    for linears in structure.all_units.values():
        for name in linears:
            assert torch.equal(model.get_submodule(name).weight, state[f"{name}.weight"])
    first, second = (f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1))
    with pytest.raises(CompressError, match=r"other weights as .*experts\.0\.w1"):
        _keep_mapped(model, structure, state | {first: state[second]})


def test_a_written_mixture_has_a_tensor_for_each_expert(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_model("mixtral"))
    request = PlanRequest(method="rtn", settings=GROUP)
    quantize_checkpoint(checkpoint.folder, tmp_path / "out", request)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert r"re:.*\.block_sparse_moe\.gate$" in config["ignore"]
    names: dict[str, list[int]] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    expert = "model.layers.1.block_sparse_moe.experts.3"
    assert names[f"{expert}.w1.weight_packed"] == [256, 16]
    assert names[f"{expert}.w2.weight_scale"] == [128, 8]
    assert names["model.layers.1.block_sparse_moe.gate.weight"] == [4, 128]
    with pytest.raises(CompressError, match="awq format was not tested with routed experts"):
        quantize_checkpoint(checkpoint.folder, tmp_path / "awq", request, format_name="awq")
