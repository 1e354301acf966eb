# SPDX-License-Identifier: Apache-2.0
"""What a CUDA graph of a denoising step needs, told without a GPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from dllm_denoising.denoiser import Denoiser
from dllm_denoising.registry import build_policy
from dllm_denoising.settings import Decoding
from tests.support.device import Device
from tests.support.llada import random_llada
from tests.vllm_plugin.diffusion.test_refusals import configure
from vllm_plugin.diffusion.batch import advance, largest, prepare, shape_of
from vllm_plugin.diffusion.forward import Forward
from vllm_plugin.diffusion.graphs import Shape, fitting, shapes
from vllm_plugin.diffusion.inputs import StepInputs
from vllm_plugin.diffusion.prediction import predictions
from vllm_plugin.diffusion.running import Running

LAYERS, BLOCK, LENGTH, MASK, WIDTH = 3, 32, 256, 63, 128
CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = Shape(24, 2, LENGTH // BLOCK, LENGTH)


def running(prompt: int, length: int, first: int, steps: int, policy: str = "never") -> Running:
    """A request behind so many steps, each of which committed two tokens."""
    decoding = Decoding(window_length=8, tokens_per_step=2)
    denoiser = Denoiser(
        list(range(3, 3 + prompt)),
        length,
        decoding,
        build_policy(policy, {}),
        mask=MASK,
        layers=LAYERS,
    )
    blocks = -(-(prompt + length) // BLOCK)
    one = Running.of(denoiser, list(range(first, first + blocks)), BLOCK)
    for _ in range(steps):
        count = len(denoiser.plan.active)
        found = torch.stack([torch.linspace(0.9, 0.1, count).double(), torch.full((count,), 7.0)])
        advance([one], found, None)
    return one


@given(st.integers(1, 300), st.integers(1, 600), st.data())
def test_the_smallest_shape_that_fits(most: int, rows: int, data: st.DataObject) -> None:
    requests = data.draw(st.integers(1, min(most, rows)))
    known = shapes(most, 8, 256)
    found = fitting(known, rows, requests)
    assert (found is None) == (rows > 512 or requests > 32)
    if found is not None:
        assert rows <= found.rows and requests <= found.requests
        smaller = [one for one in known if one < found]
        assert not any(one.rows >= rows and one.requests >= requests for one in smaller)


def test_steps_of_one_shape_lie_in_one_place() -> None:
    """And padding reads nothing and writes nothing."""
    inputs = StepInputs(largest(512, 8, SHAPE.blocks, 1), CPU)
    empty = prepare([], LAYERS, inputs, SHAPE)
    (no_rows,) = empty.metadata.values()
    assert no_rows.seq_lens.tolist() == [0, 0] and no_rows.query_start_loc.tolist() == [0, 0, 0]
    assert set(empty.stages[0].slots.tolist()) == {-1}
    for batch in (
        [running(40, 20, 1, 1), running(70, 30, 4, 2)],
        [running(5, 9, 7, 1)],
    ):
        rows = np.concatenate([one.denoiser.plan.rows for one in batch])
        assert shape_of(batch, LAYERS, [SHAPE]) == SHAPE
        step = prepare(batch, LAYERS, inputs, SHAPE)
        (made,) = step.metadata.values()
        for ours, captured in (
            (step.tokens, empty.tokens),
            (step.tables, empty.tables),
            (step.stages[0].positions, empty.stages[0].positions),
            (step.stages[0].slots, empty.stages[0].slots),
            (made.query_start_loc, no_rows.query_start_loc),
            (made.seq_lens, no_rows.seq_lens),
        ):
            assert ours.data_ptr() == captured.data_ptr() and ours.data_ptr() % 16 == 0
            assert (ours.shape, ours.stride()) == (captured.shape, captured.stride())
        assert (made.max_query_len, made.max_seq_len) == (SHAPE.rows, LENGTH)
        assert step.stages[0].positions[: len(rows)].tolist() == rows.tolist()
        assert set(step.stages[0].slots[len(rows) :].tolist()) == {-1}
        assert made.query_start_loc[-1] == len(rows) < SHAPE.rows
        assert made.seq_lens.tolist() == [len(one.slots) for one in batch] + [0] * (2 - len(batch))
        at = np.concatenate([one.denoiser.plan.active for one in batch])
        assert step.stages[0].positions[step.active].tolist() == at.tolist()


def test_what_is_padded() -> None:
    refreshing, cached = running(40, 20, 1, 0), running(40, 20, 1, 1)
    known = shapes(4, SHAPE.blocks, LENGTH)
    assert shape_of([refreshing], LAYERS, known) == Shape(64, 1, SHAPE.blocks, LENGTH)
    assert shape_of([refreshing, cached], LAYERS, known) == Shape(96, 2, SHAPE.blocks, LENGTH)
    assert shape_of([cached] * 5, LAYERS, known) is None  # more than requests that there can be
    assert shape_of([refreshing] * 4 + [cached] * 4, LAYERS, shapes(8, 8, LENGTH)) is not None
    many = running(120, 136, 1, 0)
    assert shape_of([many] * 3, LAYERS, known) is None  # 768 rows
    middle = SimpleNamespace(plan=SimpleNamespace(start=1), canvas=cached.denoiser.canvas)
    between: Any = SimpleNamespace(denoiser=middle)
    assert shape_of([cached, between], LAYERS, known) is None  # rows change between layers


def test_the_largest_step_fits_and_no_larger() -> None:
    batch = [running(100, 28, 1, 0), running(40, 24, 5, 0)]
    rows, blocks = 128 + 64, 4
    exact = largest(rows, len(batch), blocks, 1)
    prepare(batch, LAYERS, StepInputs(exact, CPU))
    with pytest.raises(ValueError, match="broadcast"):
        prepare([*batch, batch[0]], LAYERS, StepInputs(exact, CPU))


class Model(nn.Module):
    """In place of the model: its hidden states are the metadata that attention would read."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Identity() for _ in range(LAYERS)])
        self.seen: list[Any] = []

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        (metadata,) = set(map(id, get_forward_context().attn_metadata.values()))
        self.seen.append(get_forward_context().attn_metadata["0"])
        assert id(self.seen[-1]) == metadata
        hidden = torch.stack([tokens, positions], 1).float()
        return nn.functional.pad(hidden, (0, WIDTH - 2))


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    folder = tmp_path_factory.mktemp("llada")
    random_llada(folder, layers=LAYERS)
    return configure(folder, max_num_seqs=4)


def forward_of(config: VllmConfig, kind: type, device: torch.device) -> tuple[Forward, Model]:
    sizes: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 4, "head_size": 32}
    spec = FullAttentionSpec(**sizes, dtype=torch.float32, non_causal=True)
    names = {str(layer): layer for layer in range(LAYERS)}
    builder = kind(spec, list(names), config, device)
    model, known = Model(), shapes(4, LENGTH // BLOCK, LENGTH)
    return Forward(config, model, [(builder, names)], known, device), model


KINDS = [FlashAttentionMetadataBuilder, TritonAttentionMetadataBuilder]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_step_copies_once_and_waits_for_nothing(
    kind: type, configured: VllmConfig
) -> None:
    batch = [running(40, 20, 1, 1), running(70, 30, 4, 2), running(70, 30, 7, 3)]
    with Device() as seen:
        forward, _ = forward_of(configured, kind, META)
        forward.capture()
        head = torch.zeros(WIDTH, 64, device=META)
        for some in (batch, batch[:1], batch[1:]):
            before = seen.copies
            prepared = forward.prepare(some)
            assert prepared.shape is not None
            hidden = forward(prepared, None)
            found = predictions(some, hidden, prepared.active, lambda x: x @ head, MASK, 1000)
            assert found is not None and found.shape == (2, len(prepared.active))
            assert seen.copies - before == 1
        before = seen.copies
        forward.prepare([running(120, 136, 1, 0)] * 3)  # not padded, but loaded in the same way
        assert seen.copies - before == 1
    assert not seen.waits


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_reads_the_current_step(kind: type, configured: VllmConfig) -> None:
    """It has the metadata of the empty step that was captured; only its tensors are filled."""
    forward, model = forward_of(configured, kind, CPU)
    forward.capture()
    captured = len(model.seen)
    for batch in ([running(40, 20, 1, 1), running(70, 30, 4, 2)], [running(5, 9, 7, 1)]):
        prepared = forward.prepare(batch)
        hidden = forward(prepared, None)
        rows = np.concatenate([one.denoiser.plan.rows for one in batch])
        assert hidden[: len(rows), 1].tolist() == rows.tolist()
        metadata, (common,) = model.seen[-1], prepared.metadata.values()
        assert metadata.causal is False and metadata.max_query_len == prepared.shape.rows
        for ours, theirs in (
            (metadata.query_start_loc, common.query_start_loc),
            (metadata.seq_lens, common.seq_lens),
            (metadata.block_table, common.block_table_tensor),
            (metadata.slot_mapping, common.slot_mapping),
        ):
            assert ours.data_ptr() == theirs.data_ptr() and torch.equal(ours, theirs)
    assert captured == len(shapes(4, 8, LENGTH)) and len(model.seen) == captured + 2
