# SPDX-License-Identifier: Apache-2.0
"""Every allocator meets the budget, and more of it never hurts."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from quant_methods.allocators.base import Allocator
from quant_methods.allocators.budget import fill, total
from quant_methods.allocators.registry import allocators, build_allocator
from quant_methods.architecture import architecture_of
from quant_methods.calibration.blocks import Blocks
from quant_methods.calibration.divergence import NextTokenReference
from quant_methods.calibration.levels import build_levels
from quant_methods.calibration.model_probe import ModelProbe
from quant_methods.calibration.stages import Stages
from quant_methods.methods.smoothquant_plus import SmoothQuantPlus, SmoothQuantPlusSettings
from quant_methods.roundings.gptq import GPTQ
from tests.support.plans import TOKENS, load, with_plan

Table = dict[str, dict[int, float]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, Table]:
    """Losses that fall with bits, and sizes that rise; not always convex, and with equal units."""
    bits = draw(st.sampled_from([[2, 3, 4, 5, 6, 8], [4, 8], [4, 8, 16], [3]]))
    losses, sizes = {}, {}
    for index in range(draw(st.integers(1, 8))):
        weights = draw(st.sampled_from([64, 100, 4096]))
        drops = [draw(st.floats(1.01, 30)) for _ in bits]
        loss, curve = draw(st.floats(1e-4, 1)), {}
        for count, drop in zip(bits, drops, strict=True):
            curve[count] = loss
            loss /= drop
        losses[f"unit{index}"] = curve
        sizes[f"unit{index}"] = {count: weights * (count + 0.3) for count in bits}
    return losses, sizes


class Additive:
    """A probe of a model whose losses add up."""

    def __init__(self, levels: Table) -> None:
        self.levels = levels

    def __call__(
        self, bits: Mapping[str, int], tokens: int | None = None, seed: int | None = None
    ) -> float:
        return sum(self.levels[unit].get(count, 0.0) for unit, count in bits.items())


def budgets(sizes: Table) -> tuple[float, float]:
    low = sum(min(costs.values()) for costs in sizes.values())
    return low, sum(max(costs.values()) for costs in sizes.values())


@pytest.mark.parametrize("name", ["probe", "baq"])
@given(tables(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_budget_is_met_and_more_is_never_worse(
    name: str, table: tuple[Table, Table], one: float, other: float
) -> None:
    levels, sizes = table
    low, high = budgets(sizes)
    allocator: Allocator = build_allocator(name, {})
    found = []
    for share in sorted((one, other)):
        budget = low + share * (high - low)
        bits = allocator.allocate(levels, sizes, budget, Additive(levels))
        assert bits.keys() == levels.keys()
        assert total(sizes, bits) <= budget * (1 + 1e-12)
        found.append(sum(levels[unit][count] for unit, count in bits.items()))
    assert found[1] <= found[0] * (1 + 1e-9)
    most = allocator.allocate(levels, sizes, high * 1.001, Additive(levels))
    assert total(sizes, most) == pytest.approx(high)


@given(tables(), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_fill_leaves_no_room_for_another_step(table: tuple[Table, Table], share: float) -> None:
    """Between two budgets that it can spend whole, no allocation is better: by brute force."""
    levels, sizes = table
    low, high = budgets(sizes)
    budget = low + share * (high - low)
    bits = fill(levels, sizes, budget)
    spent, loss = total(sizes, bits), sum(levels[u][b] for u, b in bits.items())
    for unit, count in bits.items():
        for more, cost in sizes[unit].items():
            fits = spent - sizes[unit][count] + cost <= budget * (1 - 1e-12)
            convex = len(levels[unit]) == 2
            assert not (fits and convex and more > count), (unit, more, loss)


def test_a_budget_below_the_lowest_levels_is_refused() -> None:
    levels, sizes = {"unit": {2: 1.0, 4: 0.1}}, {"unit": {2: 100.0, 4: 200.0}}
    for name in allocators():
        with pytest.raises(CompressError, match="below the 12 bytes of the lowest levels"):
            build_allocator(name, {}).allocate(levels, sizes, 99.0, Additive(levels))


def test_baq_gives_units_of_equal_loss_equal_bits() -> None:
    """A loss that is 2^theta times larger needs one bit more."""
    levels = {f"u{i}": {b: 4.0 ** (i - b) for b in (2, 3, 4, 5, 6)} for i in range(3)}
    sizes = {unit: {b: 10.0 * b for b in curve} for unit, curve in levels.items()}
    bits = build_allocator("baq", {"theta": 2}).allocate(levels, sizes, 120.0, Additive(levels))
    assert bits == {"u0": 3, "u1": 4, "u2": 5}


def test_levels_and_probe_of_a_model(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses fall with bits, a probe agrees with the whole model, and a database resumes."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    model = load(tiny_model("qwen2"), torch.float32)
    given, arch = SmoothQuantPlusSettings(group_size=32, alpha=0.5), architecture_of(model.config)
    blocks = Blocks(model, arch, TOKENS, stages=Stages("0" * 64), chunk_tokens=32)
    plan = SmoothQuantPlus(given).plan(blocks)
    assert plan.shrinks  # of 4 bits, so no level may use them

    def build() -> tuple[Table, Table]:
        made = build_levels(
            plan,
            blocks,
            GPTQ(),
            lambda bits, grid: given.grid(bits, grid.group_size),
            (3, 4, 8, 16),
        )
        build.database = made  # type: ignore[attr-defined]
        return made.losses, made.sizes

    losses, sizes = build()
    units = arch.units(model.config)
    assert losses.keys() == sizes.keys() == units.keys()
    for curve in losses.values():
        assert curve[3] > curve[4] > curve[8] > curve[16] == 0
    monkeypatch.setattr("quant_methods.calibration.levels.round_units", None)  # all is stored
    assert build() == (losses, sizes)

    database = build.database  # type: ignore[attr-defined]
    probe = ModelProbe(blocks, database)
    some = {"model.layers.1.qkv": 3, "model.layers.1.down": 8}
    assert probe({}) == 0 and probe(dict.fromkeys(units, 16)) == 0
    assert 0 < probe({"model.layers.1.down": 8}) < probe(some)
    assert probe(some, 32, 1) > 0
    with pytest.raises(CompressError, match="was not rounded to 5 bits"):
        probe({"model.layers.0.o": 5})
    low = dict.fromkeys(units, 3) | {"model.layers.0.qkv": 16}
    reference = NextTokenReference(model, arch.layers_prefix, final(blocks))
    probed = probe(low)
    chosen = database.chosen(low, units)
    assert not chosen.shrinks
    with_plan(model, chosen, rounded=True)  # changes the model
    assert probed == pytest.approx(reference.divergence(final(blocks)), rel=1e-3)


def final(blocks: Blocks) -> torch.Tensor:
    """The output of the last block."""
    hidden = blocks.inputs()
    for index in range(len(blocks)):
        hidden = blocks.run(index, hidden)
    return hidden
