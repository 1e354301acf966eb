# SPDX-License-Identifier: Apache-2.0
"""Second-order effect of rounding: derivatives of the loss in the directions of rounding errors."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import logits_of
from compress_common.calibration.stages import Tensors
from compress_common.progress import Progress, silent
from quant_methods.calibration.levels import LevelDatabase
from quant_methods.grid import SIXTEEN


@dataclass
class Derivatives:
    """What the rounding error ``D`` of each unit does to the loss of each sample.

    ``g`` is the gradient of a sample's loss, summed over its T tokens and divided by sqrt(T), so
    that half of a mean of squares is in nats per token.

    Attributes:
        fisher: ``{unit: {bits: mean of sum(g^2 D^2) / 2}}``: the diagonal of the Fisher matrix.
        along: ``{unit: {bits: g . D}}``, fp64 [samples].
    """

    fisher: dict[str, dict[int, float]] = field(default_factory=dict)
    along: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)


def derivatives(
    blocks: Blocks, database: LevelDatabase, progress: Progress = silent
) -> Derivatives:
    """Measure every unit at every level, in one backward pass of the original model.

    Blocks are computed again for the backward pass, so memory is the input of every block, and for
    one block its gradients and its rounding errors at all levels. A finished block is stored.

    Args:
        blocks: The original decoder, with calibration tokens.
        database: Units at their levels.
        progress: Called for each block.
    """
    inputs, hidden = [], blocks.inputs()
    for index in range(len(blocks)):
        inputs.append(hidden)
        with blocks.resident(index):
            hidden = blocks.run(index, hidden)
    gradient = _at_output(blocks, hidden)
    found = Derivatives()
    for index in reversed(range(len(blocks))):
        progress("derivatives", len(blocks) - index, len(blocks))
        prefix = blocks.prefix(index)
        stored = blocks.stages.tensors(
            f"derivatives {len(hidden)} {index}",
            partial(_block, blocks, database, index, inputs.pop(), gradient),
        )
        gradient = stored["gradient"]
        for unit in (prefix + kind.name for kind in blocks.structure.layer(index).units):
            if unit not in database.losses:
                continue
            found.fisher[unit] = dict.fromkeys(database.losses[unit], 0.0)
            found.along[unit] = {
                bits: torch.zeros(len(hidden), dtype=torch.float64)
                for bits in database.losses[unit]
            }
            for bits in database.losses[unit]:
                if bits != SIXTEEN:
                    found.fisher[unit][bits] = stored[f"fisher:{unit}:{bits}"].item()
                    found.along[unit][bits] = stored[f"along:{unit}:{bits}"]
    return found


def _at_output(blocks: Blocks, final: torch.Tensor) -> torch.Tensor:
    """Return the gradient of each sample's loss at the output of the last block.

    The loss is that of the next token. On text that the model samples itself, the mean of its
    outer products is the Fisher matrix.
    """
    logits_at = logits_of(blocks.model, blocks.structure)
    device = blocks.model.get_output_embeddings().weight.device  # type: ignore[operator]
    gradient = torch.empty_like(final)
    for sample, row in enumerate(final):
        with torch.enable_grad():
            at = row.to(device).detach().requires_grad_()
            logits = logits_at(at[:-1])
            labels = blocks.tokens[sample, 1:].to(logits.device)
            loss = cross_entropy(logits, labels, reduction="sum") / len(labels) ** 0.5
            gradient[sample] = torch.autograd.grad(loss, at)[0]
    return gradient


def _block(
    blocks: Blocks,
    database: LevelDatabase,
    index: int,
    inputs: torch.Tensor,
    gradient: torch.Tensor,
) -> Tensors:
    """Go backward through a block. Returns derivatives, and the gradient at its input."""
    prefix, samples = blocks.prefix(index), len(inputs)
    stored: Tensors = {"gradient": torch.empty_like(gradient)}
    with blocks.resident(index) as block:
        errors: dict[str, list[tuple[str, torch.Tensor]]] = {}  # {linear: [(unit:bits, error)]}
        for unit in blocks.structure.layer(index).units:
            for bits in database.losses.get(prefix + unit.name, {}):
                if bits == SIXTEEN:
                    continue
                key = f"{prefix}{unit.name}:{bits}"
                sums = {"dtype": torch.float64, "device": blocks.device}
                stored[f"fisher:{key}"] = torch.zeros((), **sums)
                stored[f"along:{key}"] = torch.zeros(samples, **sums)
                for name in unit.linears:
                    weight = block.get_submodule(name).weight.detach()
                    rounded = database.weight(prefix + name, bits, blocks.device)
                    errors.setdefault(name, []).append((key, rounded - weight.float()))
        weights = [block.get_submodule(name).weight for name in errors]
        for sample in range(samples):
            with torch.enable_grad():
                at = inputs[sample : sample + 1].to(blocks.device).detach().requires_grad_()
                output = blocks.output(index, at)
                given = gradient[sample : sample + 1].to(output)
                back, *parts = torch.autograd.grad(output, [at, *weights], given)
            stored["gradient"][sample] = back[0].to(gradient.device)
            for name, part in zip(errors, parts, strict=True):
                for key, error in errors[name]:
                    product = part.float() * error
                    stored[f"along:{key}"][sample] += product.sum(dtype=torch.float64)
                    square = product.square_().sum(dtype=torch.float64)
                    stored[f"fisher:{key}"] += square / (2 * samples)
    return stored
