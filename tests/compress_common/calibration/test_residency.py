# SPDX-License-Identifier: Apache-2.0
"""Copies of one module at a time give what a model gives that is converted at once."""

from pathlib import Path

import pytest
import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.residency import copied
from compress_common.calibration.text import CalibrationSettings, sampled_tokens
from compress_common.checkpoints import loading
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.structure.derive import structure_of
from tests.support.peak import Peak


def test_a_widened_model_is_the_converted_one(
    each_tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: sampled text, logits, and blocks with other weights."""
    checkpoint, text = Checkpoint(each_tiny_model), CalibrationSettings(samples=3, length=20)
    found = []
    for whole in (1 << 40, 0):
        monkeypatch.setattr(loading, "WHOLE", whole)
        model = loading.load_model(checkpoint, torch.float32)
        assert model.dtype == (torch.float32 if whole else torch.bfloat16)
        own = [(name, id(tensor)) for name, tensor in model.named_parameters()]
        tokens = sampled_tokens(text, model, start=1)
        with torch.no_grad():
            values = [tokens, model(input_ids=tokens).logits]
        arch = structure_of(checkpoint.hf_config)
        blocks = Blocks(model, arch, tokens, computed=torch.float32)
        hidden = blocks.inputs()
        for index in range(len(blocks)):
            with blocks.resident(index) as block:
                weight = block.mlp.up_proj.weight
                assert weight.dtype == torch.float32
                with blocks.replaced(index, {"mlp.up_proj": weight.detach() * 1.001}):
                    hidden = blocks.run(index, hidden)
            values.append(hidden)
        assert own == [(name, id(tensor)) for name, tensor in model.named_parameters()]
        found.append(values)
    for converted, widened in zip(*found, strict=True):
        assert torch.equal(converted, widened)


def test_only_one_module_is_converted_at_a_time(
    each_tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(each_tiny_model)
    monkeypatch.setattr(loading, "WHOLE", 0)
    model = loading.load_model(checkpoint, torch.float32)
    config = checkpoint.hf_config
    head = 4 * config.vocab_size * config.hidden_size
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    with torch.no_grad(), Peak() as peak:
        model(input_ids=torch.arange(8)[None])
    assert max(head, block) < peak.most < max(head, block) * 1.2


def test_own_tensors_come_back_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    own = [id(x) for x in (*module.parameters(), *module.buffers())]
    with pytest.raises(RuntimeError), copied(module, torch.device("meta")):
        assert {x.device.type for x in module.parameters()} == {"meta"}
        raise RuntimeError
    assert own == [id(x) for x in (*module.parameters(), *module.buffers())]
