# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint a pipeline stage rounds: its own, each checked like any other."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from compress_common.checkpoints.identity import tensor_digest
from compress_common.errors import CompressError
from quant_methods.formats.plan import Plan
from vllm_plugin.quantization.loader import QuantizedStream, needed_by

TENSORS = {f"{name}.weight": torch.full((2, 2), float(at)) for at, name in enumerate("abc")}
TIED = {"head.weight": "a.weight"}  # what a rotation unties is made from the embedding


def streamed(
    present: str, copies: Mapping[str, str], tensors: Mapping[str, torch.Tensor] = TENSORS
) -> list[str]:
    """The tensors that a stage with these modules gets."""
    modules = {
        name: nn.Linear(2, 2, bias=False) if name in present.split() else PPMissingLayer()
        for name in ("a", "b", "c", "head")
    }
    sources = {name: tensor_digest(tensor) for name, tensor in TENSORS.items()}
    plan = Plan("rtn", {}, sources=sources, copies=dict(copies))
    needed = needed_by(nn.ModuleDict(modules), copies)
    stream = QuantizedStream(plan, tensors.items(), torch.float32, torch.device("cpu"), needed)
    return [name for name, _ in stream]


def test_tensors_of_other_stages_are_skipped() -> None:
    assert streamed("a b", {}) == ["a.weight", "b.weight"]
    assert streamed("b c head", {}) == ["b.weight", "c.weight"]


def test_a_copy_brings_its_source() -> None:
    assert streamed("c head", TIED) == ["a.weight", "head.weight", "c.weight"]


def test_each_stage_checks_what_it_takes() -> None:
    other = TENSORS | {"c.weight": torch.zeros(2, 2)}
    assert streamed("a b", {}, other) == ["a.weight", "b.weight"]
    with pytest.raises(CompressError, match="c.weight has other content"):
        streamed("c head", {}, other)
    with pytest.raises(CompressError, match="1 tensors did not come, b.weight for one"):
        streamed("b", {}, {"a.weight": TENSORS["a.weight"]})
