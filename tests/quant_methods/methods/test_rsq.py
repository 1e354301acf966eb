# SPDX-License-Identifier: Apache-2.0
"""RSQ: what its parts are worth alone, what it refuses, and that it can be interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.calibration.attention_received import AttentionReceived
from quant_methods.formats.plan import Plan
from quant_methods.formats.plan_file import plan_digest
from quant_methods.methods.rsq import expanded
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.registry import build_method
from quant_methods.roundings import blockwise
from quant_methods.roundings.blockwise import round_blocks
from tests.support.plans import TOKENS, load, with_plan

PLAIN = {"group_size": 32, "bits": 3, "rotation": "none"}


def planned(model: torch.nn.Module, method: str = "rsq", **settings: Any) -> Plan:
    blocks = Blocks(model, structure_of(model.config), TOKENS, chunk_tokens=32)
    return build_method(method, settings).plan(blocks)


def same_codes(first: Plan, second: Plan) -> bool:
    """Bit for bit."""
    return first.codes.keys() == second.codes.keys() and all(
        torch.equal(getattr(first.codes[name], part), getattr(packed, part))
        for name, packed in second.codes.items()
        for part in ("words", "scale", "zero")
    )


def test_uniform_weights_give_the_codes_of_plain_gptq(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("qwen2"), torch.float32)
    settings = {"group_size": 32, "bits": 3, "rounding": "gptq"}
    blocks = Blocks(model, structure_of(model.config), TOKENS, chunk_tokens=32)
    method = build_method("rtn", settings)
    plain = method.plan(blocks)
    round_blocks(plain, blocks, method.settings.rounder())
    assert same_codes(plain, planned(model, **PLAIN, token_weights="uniform"))
    # Weights of one each go the whole way of token weights.
    assert same_codes(plain, planned(model, **PLAIN, token_weights="firstn", first_share=1))
    assert same_codes(plain, planned(model, **PLAIN, least_weight=1))
    for other in ({}, {"power": 2}, {"token_weights": "actnorm"}, {"token_weights": "firstn"}):
        assert not same_codes(plain, planned(model, **PLAIN | other)), other


def test_weights_are_those_of_the_block_before_it_is_rounded(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model("llama"), torch.float32)
    original = [layer.self_attn.q_proj.weight.clone() for layer in model.model.layers]
    seen: list[int] = []
    weigh = AttentionReceived.__call__

    def looked(
        self: AttentionReceived, blocks: Blocks, index: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        assert torch.equal(blocks.layers[index].self_attn.q_proj.weight, original[index])
        seen.append(index)
        return weigh(self, blocks, index, hidden)

    monkeypatch.setattr(AttentionReceived, "__call__", looked)
    planned(model, **PLAIN, steps="unit")
    assert seen == [0, 0, 1, 1]  # once for each chunk, though a block has four passes


@pytest.mark.parametrize("rotation", ["heads", "both"])
def test_logits_stay_and_rounding_is_better_than_nearest(
    each_tiny_model: Path, rotation: str
) -> None:
    model = load(each_tiny_model, torch.float32)
    if rotation == "both" and "gemma3" in each_tiny_model.name:
        with pytest.raises(CompressError, match="rotate heads alone"):
            build_method("rsq", {"rotation": rotation}).settings.grids(model.config)
        return
    with torch.no_grad():
        reference = model(TOKENS).logits
    plan = planned(model, group_size=32, bits=4, rotation=rotation, steps="unit", expansion=2)
    turned = with_plan(load(each_tiny_model, torch.float32), plan, rounded=False)
    assert (turned - reference).abs().max() < 1e-3 * reference.abs().max()
    errors = [
        (with_plan(load(each_tiny_model, torch.float32), given, rounded=True) - reference).norm()
        for given in (plan, planned(model, "rtn", group_size=32, bits=4))
    ]
    assert errors[0] < errors[1]


@given(st.integers(1, 5), st.integers(2, 40), st.integers(1, 8))
def test_expansion_shifts_every_sample(samples: int, length: int, copies: int) -> None:
    tokens = torch.arange(samples * length).view(samples, length)
    more = expanded(tokens, copies)
    assert more.shape == (samples * copies, length)
    assert torch.equal(more[::copies], tokens)
    assert torch.equal(more.sort(1).values, tokens.repeat_interleave(copies, 0))
    for number, row in enumerate(more):
        sample, k = divmod(number, copies)
        assert row[k * length // copies] == tokens[sample, 0]


def test_an_interrupted_run_gives_the_same_plan(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_model("qwen3"))
    request = PlanRequest(
        method="rsq",
        settings={"group_size": 32, "bits": 3, "expansion": 2},
        calibration={"samples": 2, "length": 32},
    )
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "whole"))
    whole, _ = obtain_plan(checkpoint, request)
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "parts"))
    work, rounded = blockwise._round_block, []

    def stopping(*args: Any) -> dict[str, torch.Tensor]:
        rounded.append(args[2])
        if rounded == [0, 1]:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(blockwise, "_round_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        obtain_plan(checkpoint, request)
    again, stored = obtain_plan(checkpoint, request)
    assert rounded == [0, 1, 1]  # the first block came from its stage
    assert not stored
    assert plan_digest(again) == plan_digest(whole)


def test_rounding_to_nearest_is_refused() -> None:
    with pytest.raises(CompressError, match="rounding"):
        build_method("rsq", {"rounding": "nearest"})
