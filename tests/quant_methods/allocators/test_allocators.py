# SPDX-License-Identifier: Apache-2.0
"""Every allocator meets the budget, and more of it never hurts."""

import math
import weakref
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import NextTokenReference
from compress_common.calibration.stages import Stages
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.allocators.base import Allocator
from quant_methods.allocators.budget import fill, total
from quant_methods.allocators.evopress import Space
from quant_methods.allocators.hessian import lowering
from quant_methods.allocators.registry import allocators, build_allocator
from quant_methods.calibration.derivatives import Derivatives
from quant_methods.calibration.levels import build_levels
from quant_methods.calibration.model_probe import ModelProbe
from quant_methods.formats.plan import Plan
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
        losses[f"layers.{index}.down"] = curve
        sizes[f"layers.{index}.down"] = {count: weights * (count + 0.3) for count in bits}
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


def build(name: str, levels: Table, **settings: Any) -> Allocator:
    """An allocator that has observed something made up."""
    allocator: Any = build_allocator(name, settings)
    if name == "luq":
        allocator.ranks = {unit.rpartition(".")[0]: len(unit) % 3 for unit in levels}
    if name == "hessian":
        draw = torch.Generator().manual_seed(0)
        for unit, curve in levels.items():
            allocator.found.fisher[unit] = curve
            allocator.found.along[unit] = {
                bits: loss * torch.randn(8, generator=draw, dtype=torch.float64)
                for bits, loss in curve.items()
            }
    return allocator


SMALL = {"generations": 3, "offspring": 4, "survivors": [2, 1], "tokens": [1, 2]}


@given(tables(), st.floats(0, 1), st.sampled_from(["probe", "random"]), st.booleans())
@settings(deadline=None, max_examples=15)
def test_evopress_meets_the_budget_and_never_loses_to_its_start(
    table: tuple[Table, Table], share: float, start: str, equal: bool
) -> None:
    levels, sizes = table
    low, high = budgets(sizes)
    budget, probe = low + share * (high - low), Additive(levels)
    given = SMALL | {"start": start, "swap": "size" if equal else "any"}
    bits = build("evopress", levels, **given).allocate(levels, sizes, budget, probe)
    assert bits.keys() == levels.keys()
    assert total(sizes, bits) <= budget * (1 + 1e-12)
    assert bits == build("evopress", levels, **given).allocate(levels, sizes, budget, probe)
    if start == "probe":
        first = build("probe", levels).allocate(levels, sizes, budget, probe)
        assert probe(bits) <= probe(first) * (1 + 1e-9)


def test_probe_measures_a_level_that_rounds_activations() -> None:
    """By the curve 8 bits would lose next to nothing in both units."""
    levels = {unit: {4: 0.01, 8: 1e-4} for unit in ("layers.0.o", "layers.0.down")}
    sizes = {unit: {4: 4.0, 8: 8.0} for unit in levels}
    probe = Additive({"layers.0.o": {4: 0.1, 8: 0.01}, "layers.0.down": {4: 0.1, 8: 0.2}})
    allocator = build("probe", levels)
    allocator.rounding_inputs = frozenset({8})
    assert allocator.allocate(levels, sizes, 16.0, probe) == {"layers.0.o": 8, "layers.0.down": 4}
    allocator = build("probe", levels)
    assert set(allocator.allocate(levels, sizes, 16.0, probe).values()) == {8}


@given(tables(), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_mutations_stay_in_the_budget(table: tuple[Table, Table], share: float, seed: int) -> None:
    levels, sizes = table
    low, high = budgets(sizes)
    space, rng = Space(sizes, low + share * (high - low)), Random(seed)
    parent = space.drawn(rng)
    assert space.size(parent) <= space.budget
    assert space.genome(space.bits(parent)) == parent
    for mutate in (space.swapped, space.swapped_equal):
        for _ in range(5):
            if (child := mutate(parent, rng)) is not None:
                assert space.size(child) <= space.budget
                assert total(sizes, space.bits(child)) == pytest.approx(space.size(child))


@pytest.mark.parametrize(
    ("name", "more"), [("luq", {}), ("hessian", {}), ("hessian", {"pairwise": True})]
)
@given(tables(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_no_unit_loses_bits_to_a_larger_budget(
    name: str, more: dict, table: tuple[Table, Table], one: float, other: float
) -> None:
    levels, sizes = table
    low, high = budgets(sizes)
    found = []
    for share in sorted((one, other)):
        budget = low + share * (high - low)
        bits = build(name, levels, **more).allocate(levels, sizes, budget, Additive(levels))
        assert bits.keys() == levels.keys()
        assert total(sizes, bits) <= budget * (1 + 1e-12)
        found.append(bits)
    assert all(found[0][unit] <= found[1][unit] for unit in levels)


def test_luq_clusters_text_and_images_in_the_share_that_was_asked_for() -> None:
    """All tokens of text are alike, and those of images too: two clusters of known shares."""
    text, pictured = torch.zeros(4, 32, 8), torch.ones(70, 8)
    for share, images in ((0.25, 16), (0.5, 32)):
        luq: Any = build_allocator("luq", {"tokens": 64, "seeds": 2, "image_share": share})
        assert luq.settings.image_tokens() == images
        wanted = -sum(x / 64 * math.log(x / 64) for x in (images, 64 - images))
        mixed = luq._entropies(text, pictured)["entropy"]
        assert mixed.tolist() == pytest.approx([wanted] * 2)
        assert luq._entropies(text, None)["entropy"].tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_luq_refuses_a_share_that_takes_none_of_images_or_of_text(share: float) -> None:
    with pytest.raises(CompressError, match="leaves none of images, or none of text"):
        build_allocator("luq", {"tokens": 64, "image_share": share})


def test_luq_lowers_the_layers_of_lowest_rank() -> None:
    units = [f"layers.{i}.{name}" for i in range(4) for name in ("qkv", "o")]
    levels = {unit: {2: 0.5, 4: 0.1, 8: 0.01} for unit in units}
    sizes = {unit: {2: 2.0, 4: 4.0, 8: 8.0} for unit in units}
    luq: Any = build("luq", levels, sweep=1)
    luq.ranks = {"layers.0": 3.0, "layers.1": 0.0, "layers.2": 1.0, "layers.3": 2.0}
    bits = luq.allocate(levels, sizes, 24.5, Additive(levels))
    low = {unit for unit, count in bits.items() if count == 2}
    assert low == {"layers.1.qkv", "layers.1.o", "layers.2.qkv", "layers.2.o"}
    assert luq.report["low_layers"] == ["layers.1", "layers.2"]
    with pytest.raises(CompressError, match="needs a low level and a high one"):
        build("luq", levels, low=3).allocate(levels, sizes, 99.0, Additive(levels))
    high = build("luq", levels, low=4, high=8)
    with pytest.raises(CompressError, match="below the 4 bytes of all layers at 4 bits"):
        high.allocate(levels, sizes, 20.0, Additive(levels))


def test_hessian_sees_errors_that_cancel_and_keeps_a_bound() -> None:
    """Two units that hurt alone and not together; a third that always hurts as much as either."""
    units = ["a", "b", "c"]
    sizes = {unit: {2: 2.0, 4: 4.0} for unit in units}
    levels = {unit: {2: 1.0, 4: 0.0} for unit in units}
    zero, one = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    along = {"a": {2: one, 4: zero}, "b": {2: -one, 4: zero}, "c": {2: one, 4: zero}}
    fisher = {"a": {2: 0.5, 4: 0.0}, "b": {2: 0.6, 4: 0.0}, "c": {2: 0.55, 4: 0.0}}
    assert [unit for unit, _ in lowering(sizes, fisher, along)] == ["a", "b", "c"]
    assert [unit for unit, _ in lowering(sizes, fisher, None)] == ["a", "c", "b"]

    def bounded(bound: float, budget: float = 12.0) -> dict[str, int]:
        allocator: Any = build_allocator("hessian", {"loss_bound": bound, "pairwise": True})
        allocator.found = Derivatives(fisher, along)
        return allocator.allocate(levels, sizes, budget, Additive(levels))

    assert bounded(2.5) == {"a": 2, "b": 2, "c": 4}
    assert bounded(3.0) == dict.fromkeys(units, 2)
    with pytest.raises(CompressError, match=r"takes 1 bytes, above the budget of 1 bytes"):
        bounded(1.5, 8.0)
    levels = {unit: {2: 1.0, 4: 0.5} for unit in units}
    with pytest.raises(CompressError, match=r"already lose 1\.5000 nats"):
        bounded(1.0)


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


def few(table: tuple[Table, Table]) -> tuple[Table, Table]:
    """The first units of a table, few enough to try every allocation."""
    return tuple(dict(list(part.items())[:3]) for part in table)


def least(levels: Table, sizes: Table, budget: float) -> float:
    """The loss of the best allocation within a budget, by brute force."""
    every = (dict(zip(levels, bits, strict=True)) for bits in product(*levels.values()))
    return min(Additive(levels)(bits) for bits in every if total(sizes, bits) <= budget)


@given(tables().map(few), st.floats(-8, -2))
@settings(deadline=None, max_examples=60)
def test_fill_is_the_best_where_it_spends_a_budget_whole(
    table: tuple[Table, Table], exponent: float
) -> None:
    """Such budgets are the sizes of the allocations that are best for some price of a bit."""
    levels, sizes = table
    priced = {
        unit: min(curve, key=lambda b: (curve[b] + 10**exponent * sizes[unit][b], b))
        for unit, curve in levels.items()
    }
    budget = total(sizes, priced) * (1 + 1e-12)
    found = Additive(levels)(fill(levels, sizes, budget))
    assert found == pytest.approx(least(levels, sizes, budget), rel=1e-9)


@given(tables().map(few), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_fill_misses_the_best_by_less_than_one_raise(
    table: tuple[Table, Table], share: float
) -> None:
    levels, sizes = table
    low, high = budgets(sizes)
    budget = low + share * (high - low)
    bits = fill(levels, sizes, budget * (1 + 1e-12))
    missed = Additive(levels)(bits) - least(levels, sizes, budget)
    raises = [max(curve.values()) - min(curve.values()) for curve in levels.values()]
    assert missed <= max(raises) * (1 + 1e-9)
    for unit, count in bits.items():
        if len(levels[unit]) == 2 and count == min(levels[unit]):
            more = total(sizes, bits | {unit: max(levels[unit])})
            assert more > budget, f"{unit} still fits"


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
    given = SmoothQuantPlusSettings(group_size=32, alpha=0.5, rounding="nearest")
    arch = structure_of(model.config)
    blocks = Blocks(model, arch, TOKENS, stages=Stages("0" * 64), chunk_tokens=32)
    plan = SmoothQuantPlus(given).plan(blocks)
    assert plan.shrinks  # of 4 bits, so no level may use them

    def database_of() -> tuple[Table, Table]:
        made = build_levels(
            plan,
            blocks,
            GPTQ(),
            lambda bits, grid: given.grid(bits, grid.group_size),
            (3, 4, 8, 16),
        )
        database_of.database = made  # type: ignore[attr-defined]
        return made.losses, made.sizes

    losses, sizes = database_of()
    units = arch.all_units
    assert losses.keys() == sizes.keys() == units.keys()
    for curve in losses.values():
        assert curve[3] > curve[4] > curve[8] > curve[16] == 0
    monkeypatch.setattr("quant_methods.calibration.levels.round_units", None)  # all is stored
    assert database_of() == (losses, sizes)

    database = database_of.database  # type: ignore[attr-defined]
    probe = ModelProbe(blocks, database)
    some = {"model.layers.1.qkv": 3, "model.layers.1.down": 8}
    assert probe({}) == 0 and probe(dict.fromkeys(units, 16)) == 0
    assert 0 < probe({"model.layers.1.down": 8}) < probe(some)
    assert probe(some, 32, 1) > 0
    assert probe(some, 1 << 20, 1) == probe(some)  # all text, whatever the seed
    with pytest.raises(CompressError, match="was not rounded to 5 bits"):
        probe({"model.layers.0.o": 5})
    low = dict.fromkeys(units, 3) | {"model.layers.0.qkv": 16}
    reference = NextTokenReference(model, arch, final(blocks))
    unfolded, made = Plan.unfolded, []

    def watched(self: Plan, module: str, weight: torch.Tensor) -> torch.Tensor:
        block = module.split(".")[2]
        alive = {other for other, tensor in made if tensor() is not None}
        assert alive <= {block}, "fp32 weights of two blocks at once"
        result = unfolded(self, module, weight)
        made.append((block, weakref.ref(result)))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "unfolded", watched)
        probed = probe(low)
    assert {block for block, _ in made} == {"0", "1"}
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


def test_a_probe_rounds_activations_where_the_served_kernel_does(
    tiny_model: Callable[..., Path],
) -> None:
    model = load(tiny_model("qwen2"), torch.float32)
    given, arch = (
        SmoothQuantPlusSettings(group_size=32, eight_bit="w8a8"),
        structure_of(model.config),
    )
    blocks = Blocks(model, arch, TOKENS, chunk_tokens=32)
    plan = Plan("levels", given.grids(model.config))
    database = build_levels(plan, blocks, GPTQ(), lambda bits, _: given.grid(bits, 32), (4, 8))
    eight = dict.fromkeys(arch.all_units, 8)
    assert database.rounding_inputs == {8}
    probed = ModelProbe(blocks, database)(eight)
    reference = NextTokenReference(model, arch, final(blocks))
    chosen = database.chosen(eight, arch.all_units)
    with_plan(model, chosen, rounded=True)  # changes the model
    weights_alone = reference.divergence(final(blocks))

    def eight_bits(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        largest = inputs[0].double().abs().amax(-1, keepdim=True)
        return (((inputs[0].double() * 127 / largest).round() * largest / 127).float(),)

    for name in chosen.grids:
        model.get_submodule(name).register_forward_pre_hook(eight_bits)
    assert probed == pytest.approx(reference.divergence(final(blocks)), rel=1e-2)
    assert probed > 1.5 * weights_alone
