# SPDX-License-Identifier: Apache-2.0
"""Round the linears of a decoder block by block, on what the rounded blocks before them give."""

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Grams
from compress_common.calibration.parts import trim_heap
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from quant_methods.calibration.routing import Calibrated, enough_tokens, routed
from quant_methods.calibration.token_weights import TokenWeights, weighed
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.plan import Plan
from quant_methods.roundings.base import Rounding
from quant_methods.roundings.experts import round_experts

_TOKENS = "tokens of experts"  # among the tensors of a stored block


@torch.no_grad()
def round_blocks(
    plan: Plan,
    blocks: Blocks,
    rounding: Rounding,
    *,
    token_weights: TokenWeights | None = None,
    by_unit: bool = False,
    experts: Calibrated = "routed",
    progress: Progress = silent,
) -> None:
    """Round every linear of a plan, and put the codes into the plan.

    Each block runs on the output of the quantized blocks before it. A finished block is stored, so
    an interruption loses one block. Memory beyond the model: one chunk, the hidden states, the
    inputs of routed experts, which are as large, and the Gram matrices of one block. Routed experts
    have them one at a time.

    Args:
        plan: Has transforms and grids. Its ``codes`` are filled.
        blocks: The decoder, with calibration tokens.
        rounding: How a weight is rounded.
        token_weights: How much each token counts in the Gram matrices; None: all count alike.
        by_unit: Whether each unit is rounded on the output of the rounded ones before it in its
            block (a pass for each), not all of a block on one pass.
        experts: Which tokens routed experts are calibrated on.
        progress: Called for each block.
    """
    hidden = blocks.inputs()
    counts: dict[str, Any] = {}
    for index in range(len(blocks)):
        progress(rounding.name, index + 1, len(blocks))
        prefix = blocks.prefix(index)
        with blocks.resident(index):
            stage, grids = f"{rounding.name} {index}", plan.layer_grids(prefix)
            stored = blocks.stages.tensors(
                stage,
                partial(
                    _round_block,
                    *(plan, blocks, index, hidden, rounding, token_weights, by_unit, experts),
                ),
            )
            if _TOKENS in stored:
                counts[str(index)] = _counted(plan, blocks, index, stored[_TOKENS], experts)
            if index + 1 < len(blocks):
                # Bound to no name: fp32 weights of this block would stay while the next is rounded.
                with blocks.replaced(index, _rounded(plan, blocks, index, stored)):
                    hidden = blocks.run(index, hidden, out=hidden)
            stored = blocks.stages.reread(stage, stored)
            for name, grid in grids.items():
                plan.codes[prefix + name] = PackedWeight.taken(prefix + name, stored, grid).to(
                    "cpu"
                )
        trim_heap()
    if counts:
        plan.report["experts"] = counts


def _rounded(
    plan: Plan, blocks: Blocks, index: int, stored: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the rounded weights of a block, as they are between original neighbors."""
    prefix, weights = blocks.prefix(index), {}
    for name, grid in plan.layer_grids(prefix).items():
        packed = PackedWeight.taken(prefix + name, stored, grid).to(blocks.device)
        rounded = plan.unfolded(prefix + name, packed.unpacked().dequantize())
        own = blocks.layers[index].get_submodule(name).weight
        weights[name] = rounded.to(own.dtype)  # type: ignore[arg-type]
    return weights


def _round_block(
    plan: Plan,
    blocks: Blocks,
    index: int,
    hidden: torch.Tensor,
    rounding: Rounding,
    token_weights: TokenWeights | None,
    by_unit: bool,
    experts: Calibrated,
) -> dict[str, torch.Tensor]:
    """Round the linears of a resident block. Returns their codes as a plan file stores them."""
    prefix, kind = blocks.prefix(index), blocks.structure.layer(index)
    grids = plan.layer_grids(prefix)
    weights: dict[str, torch.Tensor] = {}  # those that are rounded already
    tensors: dict[str, torch.Tensor] = {}
    counted = weighed(blocks, index, hidden, token_weights)
    units = [unit.linears for unit in kind.units]
    for step in units if by_unit else [kind.names]:
        names = [name for name in step if name in grids]
        if not names:
            continue
        dense = [name for name in names if name not in kind.routed]
        mixed = len(dense) < len(names)
        with blocks.replaced(index, weights), routed(blocks, index, hidden=mixed) as seen:
            grams = unit_grams(plan, blocks, index, hidden, dense, counted)
        done = round_units(plan, blocks, index, dense, rounding, grams, reuse_grams=True)
        if mixed:

            def stack(
                names: tuple[str, ...], grams: dict[str, torch.Tensor], tokens: int
            ) -> dict[str, PackedWeight]:
                options = {"reuse_grams": True, "tokens": tokens}
                return round_units(plan, blocks, index, names, rounding, grams, **options)  # type: ignore[arg-type]

            more, tensors[_TOKENS] = round_experts(
                plan, blocks, index, seen, counted, experts, stack
            )
            done |= more
        for linear, packed in done.items():
            tensors |= packed.tensors(linear)
            if by_unit:  # else there is no next step
                rounded = packed.unpacked().dequantize()
                weights[linear.removeprefix(prefix)] = plan.unfolded(linear, rounded)
    return tensors


def _counted(
    plan: Plan, blocks: Blocks, index: int, tokens: torch.Tensor, experts: Calibrated
) -> dict[str, Any]:
    """Return what a report says of the tokens that went to the experts of a block."""
    kind = blocks.structure.layer(index)
    first = min(kind.routed)
    enough = enough_tokens(plan.grids[blocks.prefix(index) + first], kind.shapes[first][1])
    counts = tokens.tolist()
    shown = sum(count < enough for count in counts) if experts == "routed" else len(counts)
    return {"least": min(counts), "median": median(counts), "shown_other_tokens": shown}


def unit_grams(
    plan: Plan,
    blocks: Blocks,
    index: int,
    hidden: torch.Tensor,
    names: Sequence[str],
    weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the Gram matrix of each linear of a resident block, as its transformed weight sees it.

    Args:
        plan: Has the transforms.
        blocks: The decoder.
        index: Of the block.
        hidden: Its input.
        names: Linears of the block, by the names that they have there.
        weights: How much each token counts, as ``weighed`` returns it.
    """
    first = blocks.structure.layer(index).first_sharing
    collector = Grams(first[name] for name in names)
    blocks.run(index, hidden, (collector,), weights)
    prefix = blocks.prefix(index)
    grams: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(first[name] for name in names):
        shared = plan.transformed_gram(prefix + name, collector.value(name))
        grams |= {other: shared for other in names if first[other] == name}
    return grams


def round_units(
    plan: Plan,
    blocks: Blocks,
    index: int,
    names: Sequence[str],
    rounding: Rounding,
    grams: dict[str, torch.Tensor],
    *,
    reuse_grams: bool = False,
    tokens: int | None = None,
) -> dict[str, PackedWeight]:
    """Round linears of a resident block, those of a unit stacked. Returns them by full name.

    They stay on the compute device.

    Args:
        plan: Has transforms, grids and, from a clip search, shrinks.
        blocks: The decoder.
        index: Of the block.
        names: Linears of the block, by the names that they have there.
        rounding: How a weight is rounded.
        grams: ``{name: Gram matrix}``, as ``unit_grams`` returns them.
        reuse_grams: Whether they are dropped one by one, the largest first, and overwritten where
            no other unit needs the same one. Units that read one input share theirs.
        tokens: How many tokens they are of; None: all.
    """
    prefix, block = blocks.prefix(index), blocks.layers[index]
    found: dict[str, PackedWeight] = {}
    stacks = blocks.structure.layer(index).stacks
    units = [unit for unit in stacks if unit.linears[0] in names]
    for unit in sorted(units, key=lambda unit: len(grams[unit.linears[0]]), reverse=True):
        linears = [prefix + name for name in unit.linears]
        parts = [
            plan.smoothed(linear, block.get_submodule(linear.removeprefix(prefix)).weight)
            for linear in linears
        ]
        shrinks = [plan.shrink(linear, parts[0].device) for linear in linears]
        given = [shrink for shrink in shrinks if shrink is not None]
        sizes = [len(part) for part in parts]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        parts.clear()
        gram = grams[unit.linears[0]]
        shared = any(other is gram for name, other in grams.items() if name not in unit.linears)
        try:
            rounded = rounding.round(
                weight,
                plan.grids[linears[0]],
                gram,
                shrink=torch.cat(given) if len(given) == len(sizes) else None,
                scale_dtype=blocks.scale_dtype,
                reuse_gram=reuse_grams and not shared,
                tokens=blocks.tokens.numel() if tokens is None else tokens,
            )
        except CompressError as error:
            raise CompressError(f"{prefix}{unit.name} cannot be rounded: {error}") from error
        del gram
        if reuse_grams:
            for name in unit.linears:
                del grams[name]
        for linear, weight in zip(linears, rounded.split(sizes), strict=True):
            found[linear] = PackedWeight.of(weight)
        del rounded, weight
        trim_heap()
    return found
