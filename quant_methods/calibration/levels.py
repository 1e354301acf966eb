# SPDX-License-Identifier: Apache-2.0
"""Every unit of a model, rounded at several numbers of bits: what allocators choose from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from quant_methods.calibration.token_weights import TokenWeights, weighed
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.plan import Plan
from quant_methods.grid import SIXTEEN, Grid
from quant_methods.roundings.base import Rounding, output_error
from quant_methods.roundings.blockwise import round_units, unit_grams


@dataclass
class LevelDatabase:
    """Units at each of their levels.

    Attributes:
        plan: Has the transforms that all levels share, and the grids of linears that are quantized.
        losses: ``{unit: {bits: loss}}``: the error of the unit's output as a share of its energy.
        sizes: ``{unit: {bits: stored bits}}``, scales and zero points included.
        weights: ``{(linear, bits): rounded weight}``.
    """

    plan: Plan
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, dict[int, float]] = field(default_factory=dict)
    weights: dict[tuple[str, int], PackedWeight] = field(default_factory=dict)

    def weight(self, linear: str, bits: int, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return the weight of a linear at a level, fp32 [N, K], as it is in the original model.

        Raises:
            CompressError: It was not rounded at this level.
        """
        packed = self.weights.get((linear, bits))
        if packed is None:
            raise CompressError(f"{linear} was not rounded to {bits} bits: not among the levels")
        return self.plan.unfolded(linear, packed.to(device).unpacked().dequantize())

    @property
    def rounding_inputs(self) -> frozenset[int]:
        """Bits whose kernel rounds activations too, which ``losses`` do not count."""
        grids = {(bits, packed.grid.activations) for (_, bits), packed in self.weights.items()}
        return frozenset(bits for bits, activations in grids if activations != "none")

    def chosen(self, bits: Mapping[str, int], units: Mapping[str, tuple[str, ...]]) -> Plan:
        """Return the plan of an allocation, with the codes of its levels.

        Args:
            bits: ``{unit: bits}`` of every unit; 16 leaves it as it is.
            units: ``{unit: linears}``.
        """
        report = dict(self.plan.report)
        plan = replace(self.plan, grids={}, codes={}, shrinks={}, report=report)
        for unit, count in bits.items():
            for linear in units[unit]:
                if (linear, count) in self.weights:
                    plan.codes[linear] = self.weights[linear, count]
                    plan.grids[linear] = plan.codes[linear].grid
        return plan


def stage_name(bits: Iterable[int], index: int) -> str:
    """Return the name of the stage that holds a block at these levels."""
    return f"levels {sorted(set(bits))} {index}"


@torch.no_grad()
def build_levels(
    plan: Plan,
    blocks: Blocks,
    rounding: Rounding,
    grid: Callable[[int, Grid], Grid],
    bits: Iterable[int],
    *,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> LevelDatabase:
    """Round every unit at every level, in one pass of the original model.

    A finished block is stored, so an interruption loses one block.

    Args:
        plan: Has transforms, and grids that say which linears are quantized and their group sizes.
        blocks: The decoder, with calibration tokens.
        rounding: How a weight is rounded.
        grid: ``grid(bits, grid of the plan)`` is the grid of a level.
        bits: The levels. 16 costs nothing to make: its loss is 0.
        token_weights: How much each token counts; None: all count alike.
        progress: Called for each block.
    """
    database = LevelDatabase(plan)
    levels = sorted(set(bits))
    hidden = blocks.inputs()
    for index in range(len(blocks)):
        progress("levels", index + 1, len(blocks))
        with blocks.resident(index):
            stored = blocks.stages.tensors(
                stage_name(levels, index),
                partial(_block, plan, blocks, index, hidden, rounding, grid, levels, token_weights),
            )
            _take(database, blocks, index, stored, grid, levels)
            hidden = blocks.run(index, hidden, out=hidden)
    return database


def _block(
    plan: Plan,
    blocks: Blocks,
    index: int,
    hidden: torch.Tensor,
    rounding: Rounding,
    grid: Callable[[int, Grid], Grid],
    levels: list[int],
    token_weights: TokenWeights | None,
) -> dict[str, torch.Tensor]:
    """Round the units of a resident block at each level. Returns codes and losses."""
    prefix = blocks.prefix(index)
    tensors: dict[str, torch.Tensor] = {}
    names = list(plan.layer_grids(prefix))
    counted = weighed(blocks, index, hidden, token_weights)
    grams = unit_grams(plan, blocks, index, hidden, names, counted)
    for bits in levels:
        if bits == SIXTEEN:
            continue
        grids = {prefix + name: grid(bits, plan.grids[prefix + name]) for name in names}
        # Ranges were searched for the bits of the plan. Other levels and groups need their own.
        level = replace(plan, grids=grids, shrinks={})
        packed = round_units(level, blocks, index, names, rounding, grams)
        for linear, weight in packed.items():
            tensors |= weight.tensors(f"{bits}:{linear}")
            name = linear.removeprefix(prefix)
            before = plan.smoothed(linear, blocks.layers[index].get_submodule(name).weight)
            after = weight.unpacked().dequantize()
            lost = output_error(before, after, grams[name])
            whole = output_error(before, torch.zeros_like(before), grams[name])
            tensors[f"loss:{bits}:{linear}"] = torch.tensor([lost, whole], dtype=torch.float64)
    return tensors


def _take(
    database: LevelDatabase,
    blocks: Blocks,
    index: int,
    stored: dict[str, torch.Tensor],
    grid: Callable[[int, Grid], Grid],
    levels: list[int],
) -> None:
    """Put what ``_block`` returned into a database."""
    prefix, grids = blocks.prefix(index), database.plan.grids
    for unit in blocks.structure.layer(index).units:
        linears = [prefix + name for name in unit.linears if prefix + name in grids]
        if not linears:
            continue
        losses = database.losses.setdefault(prefix + unit.name, {})
        sizes = database.sizes.setdefault(prefix + unit.name, {})
        counts = {
            linear: blocks.layers[index].get_submodule(linear.removeprefix(prefix)).weight.shape
            for linear in linears
        }
        for bits in levels:
            losses[bits] = sizes[bits] = 0.0
            lost = torch.zeros(2, dtype=torch.float64)
            for linear in linears:
                outputs, inputs = counts[linear]
                if bits == SIXTEEN:
                    sizes[bits] += SIXTEEN * outputs * inputs
                    continue
                level = grid(bits, grids[linear])
                taken = PackedWeight.taken(f"{bits}:{linear}", stored, level).to("cpu")
                database.weights[linear, bits] = taken
                # Whole numbers, so that sums are exact in any order.
                sizes[bits] += round(level.stored_bits(inputs) * outputs * inputs)
                lost += stored[f"loss:{bits}:{linear}"]
            if bits != SIXTEEN:
                losses[bits] = (lost[0] / lost[1].clamp(min=1e-30)).item()
