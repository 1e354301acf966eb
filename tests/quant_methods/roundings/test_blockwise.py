# SPDX-License-Identifier: Apache-2.0
"""Rounding block by block holds as much memory for the last block as for the first."""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.parts import trim_heap
from compress_common.calibration.stages import Stages
from compress_common.store import Store, digest
from compress_common.structure.derive import structure_of
from quant_methods.formats.plan import Plan
from quant_methods.methods.smoothquant_plus import SmoothQuantPlusSettings
from quant_methods.roundings.blockwise import round_blocks, round_units, unit_grams
from quant_methods.roundings.gptq import GPTQ
from tests.support.plans import TOKENS, load


def storages() -> dict[int, int]:
    """Address -> bytes of the memory of every tensor that is alive."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if not issubclass(type(tensor), torch.Tensor) or tensor.layout != torch.strided:
            continue
        # Other tests of this process can leave fake or traced tensors, which have no memory.
        with suppress(RuntimeError):
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu":
                found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("by_unit", [False, True])
def test_a_finished_block_leaves_its_codes_alone(
    tiny_model: Callable[..., Path], tmp_path: Path, by_unit: bool
) -> None:
    model = load(tiny_model("llama", num_hidden_layers=4), torch.float32)
    stages = Stages(digest("memory"), Store(tmp_path))
    blocks = Blocks(model, structure_of(model.config), TOKENS, stages=stages)
    plan = Plan("rtn", SmoothQuantPlusSettings(group_size=32).grids(model.config))
    alive = []

    def progress(step: str, done: int, total: int) -> None:
        found = storages()
        for packed in plan.codes.values():
            for tensor in (packed.words, packed.scale, packed.zero):
                found.pop(tensor.untyped_storage().data_ptr(), None)
        alive.append(sum(found.values()))

    round_blocks(plan, blocks, GPTQ(), by_unit=by_unit, progress=progress)
    assert len(alive) == 4
    assert alive[1:] == alive[:1] * 3


@torch.no_grad()
def test_units_that_read_one_input_do_not_spoil_its_gram(tiny_model: Callable[..., Path]) -> None:
    """Cohere's attention and MLP both read the output of one norm."""
    model = load(tiny_model("cohere"), torch.float32)
    blocks = Blocks(model, structure_of(model.config), TOKENS)
    plan = Plan("rtn", SmoothQuantPlusSettings(group_size=32).grids(model.config))
    names = list(plan.layer_grids(blocks.prefix(0)))
    with blocks.resident(0):
        grams = unit_grams(plan, blocks, 0, blocks.inputs(), names)
        assert grams["self_attn.q_proj"] is grams["mlp.gate_proj"]
        apart = {name: gram.clone() for name, gram in grams.items()}
        found = [
            round_units(plan, blocks, 0, names, GPTQ(), *given, reuse_grams=reuse)
            for given, reuse in (((grams,), True), ((apart,), False))
        ]
    for name, packed in found[0].items():
        assert torch.equal(packed.words, found[1][name].words), name
        assert torch.equal(packed.scale, found[1][name].scale), name


def resident() -> int:
    """Anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def test_holes_in_the_heap_are_given_back() -> None:
    before = resident()
    pieces = [torch.ones(16 << 10) for _ in range(4096)]  # 64 KiB each: too small for own pages
    full = resident()
    assert full - before > 200 << 20
    kept = pieces[::16]
    del pieces
    trim_heap()
    assert full - resident() > 150 << 20
    assert len(kept) == 256
