# SPDX-License-Identifier: Apache-2.0
"""Fits low-rank bases to a model's keys and values, with transformers.

No vLLM engine is started. Blocks run one at a time on all of the text. Beyond the model itself,
memory holds the activations of one block, and for each block the held-out quarter of the text as
its projections see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.precision import computed_in
from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError, joined
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from kv_policies.latents import allocation
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import (
    SIDES,
    Header,
    Layer,
    Objective,
    Side,
    ratio_problem,
    split_problem,
)
from kv_policies.latents.format import Bits
from kv_policies.latents.low_rank import Factor
from kv_policies.model_file import Calibration
from vllm_plugin.commands.profiling.block_factors import BlockFactor, weights_of
from vllm_plugin.commands.profiling.hf_model import HFModel
from vllm_plugin.compatibility import latent_model_problems
from vllm_plugin.kv_fingerprint import weights_digest

_PARTS: Final = 4  # the text is cut into so many parts; the last is held out


@dataclass(frozen=True)
class HeldOut:
    """Relative errors of a layer's keys and values on held-out text, by method.

    They are in the metric of the objective: 0 is exact, 1 is as bad as the mean.
    """

    layer: int
    key: dict[str, float]
    value: dict[str, float]


@dataclass(frozen=True)
class _Fit:
    """The factors of one layer at full rank, and the text that they are compared on."""

    sides: dict[Side, BlockFactor]
    unseen: torch.Tensor
    weights: torch.Tensor | None

    @property
    def losses(self) -> dict[Side, torch.Tensor]:
        return {side: factor.losses for side, factor in self.sides.items()}

    def errors(self, ranks: allocation.Ranks, device: torch.device) -> dict[str, dict[str, float]]:
        """Errors on held-out text, by side and method."""
        unseen = self.unseen.to(device)
        return {
            side: factor.errors(unseen, self.weights, ranks[side])
            for side, factor in self.sides.items()
        }

    def row(self, layer: int, ranks: allocation.Ranks) -> Layer:
        """The layer's line in the header."""
        lost = {
            f"{side}_error": round(float(self.sides[side].losses[ranks[side]]), 6) for side in SIDES
        }
        return Layer(layer=layer, key_rank=ranks["key"], value_rank=ranks["value"], **lost)


@torch.no_grad()
def make_bases(
    model: str,
    ratio: Fraction,
    text: CalibrationSettings,
    *,
    bits: Bits = 16,
    allocate: bool = True,
    objective: Objective = "attention",
    tensor_parallel: int = 1,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Bases, list[HeldOut]]:
    """Fit the bases of a model, and compare them on the last quarter of the text.

    Args:
        model: A model folder or hub id.
        ratio: Share of the bytes of a 16-bit cache that is saved, in [0, 1).
        text: The calibration text.
        bits: Of a number of a latent in the cache.
        allocate: Give each layer's keys and values the ranks that they need, in the same bytes.
            False: all get the same.
        objective: What the error of keys and values is measured by; see ``BlockFactor``.
        tensor_parallel: Ranks that will serve the model. Each gets bases of its own KV heads.
        device: Where blocks run, a name or "auto"; in what, see ``computed_in``.
        progress: Told as the work advances.

    Raises:
        CompressError: The model or the text does not suit.
    """
    fitted = text.samples - text.samples // _PARTS
    if fitted == text.samples:
        raise CompressError(f"{text.samples} samples are too few: one of {_PARTS} is held out")
    subject = HFModel(model, text)
    if problems := latent_model_problems(subject.config):
        raise joined([f"{subject.name} cannot have bases: {problem}" for problem in problems])
    structure, fingerprint = structure_of(subject.config), subject.fingerprint
    if problem := split_problem(fingerprint.num_key_value_heads, tensor_parallel):
        raise CompressError(f"{subject.name} cannot have bases: {problem}")
    features = fingerprint.num_key_value_heads // tensor_parallel * fingerprint.head_dim
    if problem := ratio_problem(ratio, features, bits):
        raise CompressError(problem)
    if fitted * text.length < features:
        raise CompressError(
            f"{fitted * text.length} tokens cannot tell {features} features apart; raise the "
            "samples or the length"
        )
    place = subject.placement(device, whole=False)
    network = subject.network(progress, place.model)
    network.to(computed_in(subject.checkpoint.weight_bytes, place.device))
    tokens = subject.tokens(network, progress)
    blocks = Blocks(network, structure, tokens, place.device, states=place.states)
    fits = _fits(blocks, subject.layers, fitted, objective, bits, tensor_parallel, progress)
    if allocate:
        losses = {index: fit.losses for index, fit in fits.items()}
        sizes = allocation.allocate(losses, ratio, features, bits)
    else:
        sizes = allocation.halves(fits, ratio, features, bits)
    report: list[HeldOut] = []
    factors: list[dict[tuple[int, Side], Factor]] = [{} for _ in range(tensor_parallel)]
    for done, (index, fit) in enumerate(fits.items()):
        progress("compare", done, len(fits))
        with blocks.resident(index):
            report.append(HeldOut(index, **fit.errors(sizes[index], blocks.device)))
        for side in SIDES:
            cut = fit.sides[side].factors(sizes[index][side])
            for shard, factor in zip(factors, cut, strict=True):
                shard[index, side] = factor.float()
    progress("compare", len(fits), len(fits))
    depth = fingerprint.num_hidden_layers
    header = Header(
        model=fingerprint,
        weights=weights_digest(subject.checkpoint, structure.layers, depth),
        bits=bits,
        ratio=ratio,
        objective=objective,
        tensor_parallel=tensor_parallel,
        layers=tuple(fit.row(index, sizes[index]) for index, fit in fits.items()),
        calibration=Calibration(**subject.origin(), samples=fitted),
    )
    return Bases(header, factors), report


def _fits(
    blocks: Blocks,
    layers: Sequence[int],
    fitted: int,
    objective: Objective,
    bits: Bits,
    shards: int,
    progress: Progress,
) -> dict[int, _Fit]:
    """Run all blocks up to the last of ``layers`` and fit each to the first ``fitted`` samples."""
    fits: dict[int, _Fit] = {}
    hidden = blocks.inputs()
    for index in range(layers[-1] + 1):
        progress("fit", index, layers[-1] + 1)
        with blocks.resident(index) as block:
            inputs, hidden = _step(blocks, index, hidden)
            if index not in layers:
                continue
            seen, unseen = inputs[:fitted], inputs[fitted:]
            rotation = blocks.arguments(index)["position_embeddings"]
            attention = block.self_attn
            weights, others = (
                weights_of(attention, x, rotation, objective) for x in (seen, unseen)
            )
            sides = {
                side: BlockFactor(attention, side, seen, weights, objective, bits, shards)
                for side in SIDES
            }
            fits[index] = _Fit(sides, unseen.cpu(), others)
    progress("fit", layers[-1] + 1, layers[-1] + 1)
    return fits


def _step(blocks: Blocks, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block's projections get and what it gives, both [samples, length, hidden]."""
    seen: list[torch.Tensor] = []
    assert blocks.structure.attention is not None
    with blocks.watch(
        index, (blocks.structure.attention.key,), lambda _, inputs: seen.append(inputs)
    ):
        hidden = blocks.run(index, hidden, out=hidden)
    return torch.cat(seen), hidden
