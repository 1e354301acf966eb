# SPDX-License-Identifier: Apache-2.0
"""Routed experts: unstacked, named as in checkpoints, and behind proved folds."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.loading import decoder_problem
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from compress_common.structure.experts import Experts, unstack
from compress_common.structure.structure import Structure
from quant_methods.formats.checkpoint_formats import compressed_tensors_config, patterns
from quant_methods.grid import Grid
from quant_methods.transforms.prove import proved_folds
from tests.compress_common.structure.test_structure import model_of
from tests.conftest import EXPERT_MODELS, SHARED

TOKENS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(0))
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = EXPERT_MODELS | {
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "minimax_m2": ("MiniMaxM2Config", LOCAL),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", LOCAL),
}
FAST = ("glm4_moe", "mixtral", "qwen2_moe")
# Names of what stands behind the norm of the MLP, in a layer with experts.
GATES = {
    "hunyuan_v1_moe": ("mlp.gate.wg",),
    "minimax_m2": ("block_sparse_moe.gate",),
    "mixtral": ("block_sparse_moe.gate",),
    "phimoe": ("block_sparse_moe.gate",),
    "qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate"),
}
SHARED_EXPERTS = {
    "ernie4_5_moe": "mlp.shared_experts",
    "glm4_moe": "mlp.shared_experts",
    "hunyuan_v1_moe": "mlp.shared_mlp",
    "qwen2_moe": "mlp.shared_expert",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads cut products of other sizes in other places, and sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(name: str, **fields: Any) -> Any:
    kind, own = MIXTURES[name]
    tokens = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, kind)(**(SHARED | tokens | own | fields))


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(MIXTURES)],
)
@torch.no_grad()
def test_folds_of_a_mixture_leave_its_logits(name: str) -> None:
    config = config_of(name)
    model, structure = model_of(config), structure_of(config)
    before = model(TOKENS).logits
    saved = {f"{n}.weight" for names in structure.all_units.values() for n in names}
    assert saved <= set(
        transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())
    )
    unstack(model)
    assert torch.equal(model(TOKENS).logits, before)
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure

    kind = structure.layer(1)
    assert kind.experts is not None
    assert (kind.experts.count, kind.experts.chosen) == (4, 2)
    gates = GATES.get(name, ("mlp.gate",))
    assert kind.kept == gates
    shared = SHARED_EXPERTS.get(name)
    (norm,) = (fold for fold in kind.folds if set(gates) <= set(fold.consumers))
    behind = {n for n in kind.names if n.rpartition(".")[2] in ("gate_proj", "up_proj", "w1", "w3")}
    assert set(norm.consumers) == behind | set(gates)
    assert shared is None or f"{shared}.up_proj" in behind
    assert len(kind.routed) == 12
    assert not any(fold.producer in kind.routed for fold in kind.folds)
    assert [unit.name for unit in kind.units if set(unit.linears) & kind.routed] == ["experts"]

    found = proved_folds(Blocks(model, structure, TOKENS))
    assert found == [structure.layer(index).folds for index in range(2)]
    for index, folds in enumerate(found):
        layer = model.get_submodule(f"{structure.layers}.{index}")
        for fold in folds:
            producer = layer.get_submodule(fold.producer)
            vector = torch.rand(producer.weight.shape[0]) + 0.5
            producer.weight.div_(vector if fold.from_norm else vector[:, None])
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(vector)
            wide = vector.view(-1, 1, fold.head_dim).expand(-1, fold.repeat, -1).reshape(-1)
            for consumer in fold.consumers:
                layer.get_submodule(consumer).weight.mul_(wide)
    assert (model(TOKENS).logits - before).abs().max() < 2e-4 * before.abs().max()


def test_layers_that_predict_further_tokens_are_left_alone() -> None:
    config = config_of("glm4_moe", num_nextn_predict_layers=1)
    structure = structure_of(config)
    every = [f"{n}.weight" for linears in structure.all_units.values() for n in linears]
    every += ["model.layers.1.mlp.gate.weight"]
    more = [name.replace("layers.1.", "layers.2.") for name in every if "layers.1." in name]
    assert decoder_problem(every + more, structure) is None
    further = [name.replace("layers.1.", "layers.3.") for name in every if "layers.1." in name]
    assert "does not name" in str(decoder_problem(every + further, structure))
    grids = {name.removesuffix(".weight"): Grid(32) for name in every[:-1]}
    ignored = compressed_tensors_config(grids, config, {})["ignore"]
    matched = [n for n in every + more if any(re.match(p[3:], n[:-7]) for p in ignored)]
    assert matched == ["model.layers.1.mlp.gate.weight", *more]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gelu": ("Qwen3MoeConfig", SHARED | {"hidden_act": "gelu"}, "activation GELU.*computes SiLU"),
    "gpt_oss": ("GptOssConfig", {"num_hidden_layers": 2}, "its experts have biases"),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}, "for all experts of a layer"),
    "llama4": ("Llama4TextConfig", {"num_hidden_layers": 2}, "or are not stacked as"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_experts_that_cannot_be_quantized_are_refused_by_name(name: str) -> None:
    kind, fields, reason = REFUSED[name]
    config = getattr(transformers, kind)(**fields)
    with pytest.raises(CompressError, match=reason) as caught:
        structure_of(config)
    assert f"model_type {config.model_type!r} is not supported: " in str(caught.value)


def test_experts_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config_of("qwen3_moe"))
    own = Qwen3MoeExperts.forward.__wrapped__

    @functools.wraps(lambda self, hidden, chosen, weights: own(self, hidden, chosen, weights) * 1.1)
    def forward(*args: Any) -> torch.Tensor:
        return own(*args)

    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    with pytest.raises(CompressError, match="compute something else"):
        unstack(model)


def test_a_gate_that_the_norm_is_not_folded_into_is_not_proved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of("qwen2_moe")
    model, structure = model_of(config), structure_of(config)
    unstack(model)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    gate.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
    first, second = proved_folds(Blocks(model, structure, TOKENS))
    assert first == structure.layer(0).folds
    assert {fold.producer for fold in first} - {fold.producer for fold in second} == {
        "post_attention_layernorm"
    }
    assert "model.layers.1.post_attention_layernorm is not folded into" in caplog.text


@torch.no_grad()
def test_showing_an_expert_all_tokens_leaves_the_output() -> None:
    model = model_of(config_of("qwen3_moe"))
    unstack(model)
    layer = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(layer, Experts)
    hidden, chosen = torch.randn(8, 128), torch.arange(16).view(8, 2) % 3
    weights, seen = torch.rand(8, 2), []
    layer.get_submodule("3.up_proj").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    plain = layer(hidden, chosen, weights)
    assert not seen
    layer.everyone = True
    assert torch.allclose(layer(hidden, chosen, weights), plain, atol=1e-6)
    assert torch.equal(seen[0], hidden)


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral", "qwen2_moe"])
def test_a_config_names_experts_and_leaves_gates(name: str) -> None:
    config = config_of(name)
    structure = structure_of(config)
    every = [linear for linears in structure.all_units.values() for linear in linears]
    for left in ((), ("model.layers.1.experts",), tuple(structure.all_units)[:2]):
        names = {n for unit in left for n in structure.all_units[unit]}
        grids = {n: Grid(32) for n in every if n not in names}
        written = compressed_tensors_config(grids, config, {})
        ignored = [p.removeprefix("re:") for p in written["ignore"]]
        gates = [
            f"model.layers.{index}.{gate}"
            for index in range(2)
            for gate in structure.layer(index).kept
        ]
        assert all(any(re.match(p, gate) for p in ignored) for gate in gates)
        assert {n for n in every if any(re.match(p, n) for p in ignored)} == names
        assert len(json.dumps(written)) < 2000  # no pattern for each expert
    one = structure.all_units["model.layers.1.experts"]
    found = [pattern.removeprefix("re:") for pattern in patterns(one, structure)]
    assert {n for n in every if any(re.match(p, n) for p in found)} == set(one)
