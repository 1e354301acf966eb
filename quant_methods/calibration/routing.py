# SPDX-License-Identifier: Apache-2.0
"""Which experts tokens go to: what an expert is calibrated on, and what quantization changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.structure.experts import Experts
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid

# What routed experts are calibrated on: the tokens that go to them, or all tokens.
Calibrated = Literal["routed", "all"]
# Input groups of a weight for each of which an expert needs a token. It is shown others until then.
ENOUGH_GROUPS = 4
_COMPARED = 2048  # tokens whose routing is compared, at the least one sample


@dataclass
class Routed:
    """What the routed experts of a block get.

    Attributes:
        hidden: Their input, [tokens, hidden]; None: it is not kept, or nothing has run yet.
        chosen: The experts of each token, in chunks [tokens, chosen].
    """

    hidden: torch.Tensor | None = None
    chosen: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def routed(blocks: Blocks, index: int, *, hidden: bool = True) -> Iterator[Routed]:
    """Note what the routed experts of a block get while the context lasts.

    Args:
        blocks: The decoder.
        index: Of the block.
        hidden: Whether the inputs are kept, where hidden states lie; False: the choice alone.
    """
    seen, experts = Routed(), blocks.structure.layer(index).experts
    if experts is None:
        yield seen
        return

    def watch(given: torch.Tensor, chosen: torch.Tensor) -> None:
        if hidden:
            if seen.hidden is None:  # of all tokens: chunks would be held twice when joined
                shape = blocks.tokens.numel(), given.shape[-1]
                seen.hidden = torch.empty(shape, dtype=given.dtype, device=blocks.states)
            start = sum(map(len, seen.chosen))
            seen.hidden[start : start + len(given)] = given
        seen.chosen.append(chosen)

    module = blocks.layers[index].get_submodule(experts.module)
    assert isinstance(module, Experts)
    module.watch = watch
    try:
        yield seen
    finally:
        module.watch = None


def enough_tokens(grid: Grid, inputs: int) -> int:
    """Return how many tokens an expert is calibrated on at the least: four times a group.

    Args:
        grid: Of its linears.
        inputs: Input channels, which stand for a group where a row has one scale.
    """
    return ENOUGH_GROUPS * grid.width(inputs)


def tokens_for(chosen: torch.Tensor, expert: int, enough: int) -> tuple[torch.Tensor, int]:
    """Return the tokens that an expert is calibrated on, and how many of them go to it.

    Where too few do, others follow at equal distances, up to ``enough``.

    Args:
        chosen: The experts of each token, [tokens, chosen].
        expert: Which.
        enough: How many tokens it needs.

    Returns:
        Indices, int64, and a count.
    """
    goes = (chosen == expert).any(-1)
    own = goes.nonzero().flatten()
    if len(own) >= enough or len(own) == len(chosen):
        return own, len(own)
    others = (~goes).nonzero().flatten()
    wanted = min(enough - len(own), len(others))
    places = torch.arange(wanted, device=others.device) * len(others) // wanted
    return torch.cat([own, others[places]]), len(own)


@torch.no_grad()
def routing_kept(plan: Plan, blocks: Blocks) -> dict[str, Any]:
    """Return the share of tokens whose chosen experts are the same after quantization.

    The original and the quantized decoder run on the first 2,048 calibration tokens, in whole
    samples. A gate that smoothing changes is rounded to the type of the served model here too.

    Args:
        plan: Complete.
        blocks: The decoder, with calibration tokens.

    Returns:
        ``{"tokens": count, "unchanged": mean share, "by_layer": {layer: share}}``.
    """
    part = blocks.first(max(1, _COMPARED // blocks.tokens.shape[1]))
    before, after = part.inputs(), part.inputs()
    shares: dict[str, float] = {}
    for index in range(len(part)):
        with part.resident(index):
            with routed(part, index, hidden=False) as original:
                before = part.run(index, before, out=before)
            weights = served_weights(plan, part, index)
            with part.replaced(index, weights), routed(part, index, hidden=False) as quantized:
                after = part.run(index, after, out=after)
        if original.chosen:
            pair = (torch.cat(seen.chosen).sort(-1).values for seen in (original, quantized))
            same = torch.eq(*pair).all(-1)
            shares[str(index)] = round(same.float().mean().item(), 4)
    return {
        "tokens": part.tokens.numel(),
        "unchanged": round(sum(shares.values()) / len(shares), 4),
        "by_layer": shares,
    }


def served_weights(plan: Plan, blocks: Blocks, index: int) -> dict[str, torch.Tensor]:
    """Return the weights of a resident block as they are served, between original neighbors.

    Args:
        plan: Complete.
        blocks: The decoder.
        index: Of the block.
    """
    prefix, block = blocks.prefix(index), blocks.layers[index]
    weights: dict[str, torch.Tensor] = {}
    kind = blocks.structure.layer(index)
    for name in (*kind.names, *kind.kept):
        full, weight = prefix + name, block.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        if full in plan.grids:
            served = plan.quantized(full, weight, blocks.scale_dtype).dequantize()
        elif f"{full}.input" in plan.vectors:
            served = plan.smoothed(full, weight).to(blocks.dtype).float()
        else:
            continue
        weights[name] = plan.unfolded(full, served).to(weight.dtype)
    return weights
