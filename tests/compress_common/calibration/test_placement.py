# SPDX-License-Identifier: Apache-2.0
"""Where calibration keeps what, and what crosses between host and device when it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from compress_common.calibration import parts, placement
from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Grams
from compress_common.calibration.placement import (
    ON_HOST,
    Placement,
    Sizes,
    chosen_device,
    fitting,
    placed,
)
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.grid import Grid, fake_quantize, quantize, searched_shrink
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.support.device import Counted

GIB = 1 << 30
META, HOST = torch.device("meta"), torch.device("cpu")
SAMPLES, LENGTH, LAYERS = 4, 32, 3
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    dtype="bfloat16",
)
TOKENS = torch.randint(0, 256, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
WEIGHTS = 9  # tensors of a block


def decoder(home: torch.device) -> LlamaForCausalLM:
    with home:
        return LlamaForCausalLM(CONFIG).eval()


def on_device(model: Any, states: torch.device | None = None, **options: Any) -> Blocks:
    return Blocks(model, structure_of(CONFIG), TOKENS, META, states=states, **options)


# of a tiny model, of 8B with 8,192 tokens, of 70B
TINY, LARGE, HUGE = (
    Sizes(1 << 20, 1 << 15, 1 << 22, 1 << 16),
    Sizes(16 * GIB, GIB // 2, 4 * GIB, GIB // 8),
    Sizes(140 * GIB, 2 * GIB, 8 * GIB, GIB),
)


@pytest.mark.parametrize(
    ("sizes", "free", "fit"),
    [
        (TINY, 2 * GIB, (True, True)),
        (TINY, GIB, None),  # the margin alone takes it
        (LARGE, 79 * GIB, (True, True)),
        (LARGE, 24 * GIB, (True, True)),
        (LARGE, 22 * GIB, (False, True)),
        (LARGE, 5 * GIB + GIB // 2, (False, False)),
        (LARGE, 4 * GIB, None),
        (HUGE, 79 * GIB, (False, True)),
    ],
)
def test_what_fits_is_kept_there(sizes: Sizes, free: int, fit: tuple[bool, bool] | None) -> None:
    assert fitting(sizes, free) == fit


@given(st.builds(Sizes, *[st.integers(0, 1 << 40)] * 4), st.integers(0, 1 << 40), st.integers(0, 9))
def test_more_memory_never_keeps_less(sizes: Sizes, free: int, more: int) -> None:
    order = [None, (False, False), (False, True), (True, True)]
    assert order.index(fitting(sizes, free)) <= order.index(fitting(sizes, free + more * GIB))


def test_an_8b_model_fits_where_it_is_said_to() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    sizes = placement.sizes_of(config, 16_060_522_496, 64 * 128)
    assert fitting(sizes, 79 * GIB) == (True, True)  # H100
    assert fitting(sizes, 22 * GIB) == (True, True)  # L4
    assert fitting(sizes, 16 * GIB) == (False, True)
    assert 3 * GIB < sizes.work < 5 * GIB
    assert sizes.block < 0.6 * GIB


def test_a_device_is_chosen_and_refused_by_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed("cpu", HUGE) is ON_HOST
    assert placed("meta", LARGE) == Placement(META, HOST, HOST)  # how much is free is not known
    monkeypatch.setattr(placement, "free_memory", lambda device: 22 * GIB)
    assert placed("meta", LARGE) == Placement(META, HOST, META)
    assert placed("meta", TINY) == Placement(META, META, META)
    with pytest.raises(CompressError, match=r"22\.0 GiB free, .* about 20\.1 GiB .* --device cpu"):
        placed("meta", LARGE, whole=True)
    with pytest.raises(CompressError, match="device cuda:99 cannot be used"):
        placed("cuda:99", TINY)
    for name in ("cuda:99", "gpu"):
        with pytest.raises(CompressError, match=f"^the device {name} cannot be used .*; give cpu$"):
            chosen_device(name, lambda: TINY)
    assert chosen_device("meta", lambda: HUGE) == "meta"  # only auto is chosen for the user
    assert chosen_device("auto", lambda: TINY) == "cpu"  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placement, "placed", lambda *args, **kwargs: ON_HOST)
    assert chosen_device("auto", lambda: TINY) == "cuda"


@pytest.mark.parametrize("chunk", [LENGTH, 4096], ids=["four chunks", "one chunk"])
def test_a_model_on_the_device_is_not_copied(chunk: int) -> None:
    with Counted() as device:
        blocks = on_device(decoder(META), chunk_tokens=chunk)
        device.ups.clear()
        hidden = blocks.inputs()
        assert set(device.ups) == {(min(SAMPLES, chunk // LENGTH), LENGTH)}  # tokens
        device.ups.clear()
        device.reads = 0
        for index in range(LAYERS):
            with blocks.resident(index):
                hidden = blocks.run(index, hidden, (Grams(blocks.structure.names),), out=hidden)
    assert (device.ups, device.downs, device.waits.count("copy_")) == ([], [], 0)
    assert device.reads == LAYERS  # one a block, however many chunks


def test_blocks_go_up_and_never_back() -> None:
    model = decoder(HOST)
    blocks = on_device(model, META)
    own = list(model.parameters())
    with Counted() as device:
        hidden = blocks.inputs()
        device.ups.clear()
        device.reads = 0
        for index in range(LAYERS):
            with blocks.resident(index) as block, blocks.resident(index):
                assert {x.device for x in block.parameters()} == {META}
                hidden = blocks.run(index, hidden, out=hidden)
    assert (len(device.ups), device.downs, device.reads) == (LAYERS * WEIGHTS, [], LAYERS)
    assert all(x is y for x, y in zip(own, model.parameters(), strict=True))


def test_states_that_do_not_fit_stay_on_the_host() -> None:
    blocks = on_device(decoder(HOST), HOST, chunk_tokens=LENGTH)
    with Counted() as device:
        hidden = blocks.inputs()
        device.ups.clear()
        with blocks.resident(0):
            blocks.run(0, hidden, out=hidden)
    chunk = (1, LENGTH, CONFIG.hidden_size)
    assert device.ups.count(chunk) == len(device.downs) == SAMPLES
    assert set(device.downs) == {chunk}


def test_rounding_waits_once_however_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(4096, 1024, device="meta")
    energy, grid = torch.empty(1024, device="meta"), Grid(128)
    for free, count in ((0, 16), (1 << 33, 1)):
        monkeypatch.setattr(parts, "free_memory", lambda device, free=free: free)
        assert len(list(parts.row_parts(weight, 6))) == count
        for work in (
            lambda: quantize(weight, grid),
            lambda: fake_quantize(weight, grid),
            lambda: searched_shrink(weight, grid, energy),
        ):
            with Counted() as device:
                work()
            assert (device.reads, device.ups, device.downs) == (1, [], [])


@pytest.mark.parametrize(
    ("kind", "free", "size"),
    [
        ("cpu", 1 << 40, 1 << 18),  # whatever is free
        ("cuda", 80 * GIB, 1 << 27),
        ("cuda", 1 << 30, (1 << 30) // 96),
        ("cuda", 0, 1 << 18),
    ],
)
def test_part_size(kind: str, free: int, size: int) -> None:
    assert parts.part_size(kind, 6, free) == size


@pytest.mark.parametrize("settings", [{}, {"rounding": "nearest"}], ids=["gptq", "nearest"])
def test_a_whole_calibration_copies_the_model_once(
    settings: dict[str, Any],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up: the weights, the tokens and rounded codes. Back: codes and statistics, and of the hidden
    states only the last, once, which smoothing is judged by: they are stored, and come up again."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(placement, "free_memory", lambda device: 80 * GIB)
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another. " * 60)
    checkpoint = Checkpoint(tiny_model("qwen2"))
    calibration = {"source": str(text), "samples": 4, "length": 32}
    request = PlanRequest(settings=settings, calibration=calibration)
    with Counted() as device:
        plan, stored = obtain_plan(checkpoint, request, device="meta")
    assert not stored and plan.sources
    linears = {shape for shape, _ in checkpoint.shapes().values() if len(shape) == 2}
    for shape in linears:
        same = [name for name, (other, _) in checkpoint.shapes().items() if other == shape]
        assert device.ups.count(shape) == len(same), shape
    states = (4, 32, checkpoint.hf_config.hidden_size)
    assert device.ups.count(states) == device.downs.count(states) == (1 if settings else 0)
