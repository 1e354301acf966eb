# SPDX-License-Identifier: Apache-2.0
"""Round the routed experts of a block, one after the other."""

from collections.abc import Callable

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Grams
from compress_common.errors import CompressError
from quant_methods.calibration.routing import Calibrated, Routed, enough_tokens, tokens_for
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.plan import Plan

# ``round_units`` with plan, blocks, index and rounding given: names, Gram matrices and tokens.
RoundStack = Callable[[tuple[str, ...], dict[str, torch.Tensor], int], dict[str, PackedWeight]]


def round_experts(
    plan: Plan,
    blocks: Blocks,
    index: int,
    seen: Routed,
    weights: torch.Tensor | None,
    calibrated: Calibrated,
    round_stack: RoundStack,
) -> tuple[dict[str, PackedWeight], torch.Tensor]:
    """Round the experts of a resident block. Memory holds the Gram matrix of one linear.

    Args:
        plan: Has transforms and grids.
        blocks: The decoder.
        index: Of the block.
        seen: What the experts get.
        weights: How much each token counts, [samples, length]; None: all count alike.
        calibrated: On which tokens.
        round_stack: Rounds linears that share an input.

    Returns:
        The rounded linears by full name, and how many tokens went to each expert, int64 [experts].

    Raises:
        CompressError: The calibration text is too short for an expert.
    """
    kind = blocks.structure.layer(index)
    assert kind.experts is not None and seen.hidden is not None
    hidden, chosen = seen.hidden, torch.cat(seen.chosen)
    counted = None if weights is None else weights.flatten()
    found: dict[str, PackedWeight] = {}
    counts: list[int] = []
    stacks = [stack for stack in kind.stacks if stack.linears[0] in kind.routed]
    for expert in range(kind.experts.count):
        start = f"{kind.experts.module}.{expert}."
        own = [stack.linears for stack in stacks if stack.linears[0].startswith(start)]
        first = own[0][0]
        grid = plan.grids[blocks.prefix(index) + first]
        enough = enough_tokens(grid, kind.shapes[first][1])
        if calibrated == "all":
            enough = len(chosen)
        tokens, went = tokens_for(chosen, expert, enough)
        counts.append(went)
        for linears in own:
            gram = _gram(blocks, index, start[:-1], linears[0], hidden, tokens, counted)
            gram = plan.transformed_gram(blocks.prefix(index) + linears[0], gram)
            found |= round_stack(linears, dict.fromkeys(linears, gram), len(tokens))
    return found, torch.tensor(counts)


def _gram(
    blocks: Blocks,
    index: int,
    expert: str,
    linear: str,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    counted: torch.Tensor | None,
) -> torch.Tensor:
    """Return the Gram matrix of the inputs of one linear of an expert, for some tokens."""
    module, collector = blocks.layers[index].get_submodule(expert), Grams((linear,))
    for part in tokens.split(blocks.chunk_tokens):
        inputs: list[torch.Tensor] = []
        with blocks.watch(index, (linear,), lambda _, x: inputs.append(x)):  # noqa: B023
            module(hidden[part.to(hidden.device)].to(blocks.device))
        weights = None if counted is None else counted[part.to(counted.device)].to(blocks.device)
        collector.see(linear, inputs[0].float(), weights)
    if not collector.tokens[linear]:
        raise CompressError(f"{expert} of decoder block {index} got no calibration token")
    return collector.value(linear)
