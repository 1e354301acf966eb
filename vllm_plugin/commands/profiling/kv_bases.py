# SPDX-License-Identifier: Apache-2.0
"""Bases: low-rank factors of a model's keys and values, fitted with transformers.

No vLLM engine is started. Blocks run one at a time on all of the text: beyond the model itself,
memory holds the activations of one block, and of each what its held-out quarter of the text gives
its projections.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress_common.errors import CompressError
from kv_policies.latents import allocation
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES, Calibration, Header, Layer, Objective, Side
from kv_policies.latents.low_rank import Factor
from quant_methods.architecture import QKV, architecture_of
from quant_methods.base import Progress, silent
from quant_methods.blocks import Blocks
from quant_methods.calibration import CalibrationSettings, calibration_tokens
from quant_methods.checkpoint import Checkpoint, resolve
from vllm_plugin.commands.profiling.block_factors import BlockFactor, weights_of
from vllm_plugin.commands.profiling.hf_model import layers_to_fit, loaded, origin, usable
from vllm_plugin.kv_fingerprint import fingerprint_of, weights_digest

_PARTS: Final = 4  # the last of so many parts of the text is held out


@dataclass(frozen=True)
class HeldOut:
    """Relative errors of a layer's keys and values, by method, on text that nothing was fitted to.

    In the objective's own metric: 0 is exact, 1 is as bad as their mean.
    """

    layer: int
    key: dict[str, float]
    value: dict[str, float]


@dataclass(frozen=True)
class _Fit:
    """The factors of one layer, of full rank, and what they are compared on."""

    sides: dict[Side, BlockFactor]
    unseen: torch.Tensor
    weights: torch.Tensor | None

    @property
    def energies(self) -> dict[Side, torch.Tensor]:
        return {side: factor.energies.cpu() for side, factor in self.sides.items()}

    def errors(self, ranks: allocation.Ranks, device: torch.device) -> dict[str, dict[str, float]]:
        """By side and method, on text that was not fitted to."""
        unseen = self.unseen.to(device)
        return {
            side: factor.errors(unseen, self.weights, ranks[side])
            for side, factor in self.sides.items()
        }


@torch.no_grad()
def make_bases(
    model: str,
    ratio: Fraction,
    text: CalibrationSettings,
    *,
    allocate: bool = True,
    objective: Objective = "attention",
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Bases, list[HeldOut]]:
    """The bases of a model folder or hub id, and how they do on the last quarter of the text.

    ratio: share of the cache's numbers that is saved. allocate: share out ranks over layers, keys
    and values as they need them, in the same bytes; False: the same for all. device: where blocks
    run, in the checkpoint's dtype. CompressError when the model or the text does not suit.
    """
    fitted = text.samples - text.samples // _PARTS
    if fitted == text.samples:
        raise CompressError(f"{text.samples} samples are too few: one of {_PARTS} is held out")
    folder = resolve(model)
    name = folder.resolve().name if Path(model).expanduser().is_dir() else model
    checkpoint = Checkpoint(folder)  # says what is wrong with the files
    config = loaded(AutoConfig, folder, name)
    layers = layers_to_fit(name, config)
    arch = architecture_of(config)
    if cap := getattr(config, "attn_logit_softcapping", None):
        raise CompressError(
            f"{name} caps its attention scores (at {cap}), which cskv does not serve"
        )
    fingerprint = fingerprint_of(name, config)
    features = fingerprint.num_key_value_heads * fingerprint.head_dim
    if fitted * text.length < features:
        raise CompressError(
            f"{fitted * text.length} tokens cannot tell {features} features apart; raise the "
            "samples or the length"
        )
    place = usable(device)

    progress("load model", 0, 1)
    network = loaded(AutoModelForCausalLM, folder, name, dtype="auto").eval()
    tokenizer = loaded(AutoTokenizer, folder, name)
    blocks = Blocks(network, arch, calibration_tokens(text, network, tokenizer, progress), place)
    fits: dict[int, _Fit] = {}
    for index in range(layers[-1] + 1):
        progress("fit", index, layers[-1] + 1)
        with blocks.resident(index) as block:
            inputs = _inputs(blocks, index)
            if index not in layers:
                continue
            seen, unseen = inputs[:fitted], inputs[fitted:]
            rotation = blocks.argument(index, "position_embeddings")
            attention = block.self_attn
            weights, others = (
                weights_of(attention, x, rotation, objective) for x in (seen, unseen)
            )
            sides = {side: BlockFactor(attention, side, seen, weights, objective) for side in SIDES}
            fits[index] = _Fit(sides, unseen.cpu(), others)
    progress("fit", layers[-1] + 1, layers[-1] + 1)

    if allocate:
        energies = {index: fit.energies for index, fit in fits.items()}
        ranks = allocation.allocate(energies, ratio, features)
    else:
        ranks = allocation.halves(fits, ratio, features)
    rows: list[Layer] = []
    factors: dict[tuple[int, Side], Factor] = {}
    report = []
    for done, (index, fit) in enumerate(fits.items()):
        progress("compare", done, len(fits))
        row = ranks[index]
        with blocks.resident(index):
            report.append(HeldOut(index, **fit.errors(row, place)))
        lost = {f"{side}_error": round(fit.sides[side].lost(row[side]), 6) for side in SIDES}
        rows.append(Layer(layer=index, key_rank=row["key"], value_rank=row["value"], **lost))
        for side in SIDES:
            factors[index, side] = fit.sides[side].factor.cut(row[side]).float()
    progress("compare", len(fits), len(fits))

    calibration = Calibration(**origin(text), samples=fitted)
    header = Header(
        model=fingerprint,
        weights=weights_digest(checkpoint, arch.layers_prefix, fingerprint.num_hidden_layers),
        ratio=ratio,
        objective=objective,
        layers=tuple(rows),
        calibration=calibration,
    )
    return Bases(header, factors), report


def _inputs(blocks: Blocks, index: int) -> torch.Tensor:
    """What a block's projections get, [samples, length, hidden]; steps to the next block."""
    seen: list[torch.Tensor] = []
    with blocks.watch(index, QKV[1:2], lambda _, inputs: seen.append(inputs)):
        blocks.hidden = blocks.run(index, blocks.hidden)
    return seen[0]
