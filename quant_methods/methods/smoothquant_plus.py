# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant+: one smoothing strength for the whole model, then group-wise rounding.

By default GPTQ rounds and nothing is smoothed, which lost less wherever it was measured.

Paper: SmoothQuant+: Accurate and Efficient 4-bit Post-Training Weight Quantization for LLM,
https://arxiv.org/abs/2312.03788
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from quant_methods.architecture import Fold
from quant_methods.base import Capabilities, GridSettings
from quant_methods.calibration.blocks import Blocks
from quant_methods.calibration.collectors import Energies, Maxima
from quant_methods.calibration.divergence import NextTokenReference
from quant_methods.formats.plan import Plan, layer_grids
from quant_methods.grid import Grid, fake_quantize
from quant_methods.progress import Progress, silent
from quant_methods.roundings.base import Rounding
from quant_methods.roundings.gptq import GPTQ
from quant_methods.transforms.smoothing import (
    add_fold,
    clip_percents,
    search_alpha,
    smoothing_vector,
    to_consumer,
    to_producer,
)


class SmoothQuantPlusSettings(GridSettings):
    """Settings. Those of the paper are ``PAPER``."""

    rounding: Literal["nearest", "gptq"] = Field(
        "gptq",
        description="gptq: later columns compensate the rounding error of each column; stores "
        "codes as large as the quantized model. nearest (paper): each weight on its own",
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fixed smoothing strength; unset: searched on calibration text, if anything is "
        "smoothed",
    )
    search: Literal["coarse", "full"] = Field(
        "coarse",
        description="alphas tried on the 0.05 grid: about 7 around the best, or all 21, each with "
        "its clip search (slow, for offline use)",
    )
    folds: Literal["none", "norms", "all"] | None = Field(
        None,
        description="smooth nothing, norm-fed linears only (paper), or o_proj and down_proj too; "
        "unset: norms with rounding=nearest or a given alpha, else none",
    )
    clip: bool = Field(True, description="narrow each group's range where that lowers the error")

    @property
    def smoothed(self) -> Literal["none", "norms", "all"]:
        """What is smoothed, when ``folds`` leaves it open."""
        if self.folds is not None:
            return self.folds
        return "norms" if self.rounding == "nearest" or self.alpha is not None else "none"

    @model_validator(mode="after")
    def _alpha_has_a_use(self) -> Self:
        if self.folds == "none" and self.alpha is not None:
            raise ValueError("`alpha` smooths, and folds=none does not; remove one of them")
        return self

    def rounder(self) -> Rounding:
        """Return the rounding; without clipping, of the whole range of each group."""
        if self.rounding == "gptq" and not self.clip:
            return GPTQ(ranges="minmax")
        return super().rounder()


PAPER: dict[str, Any] = {
    "rounding": "nearest",
    "search": "full",
    "folds": "norms",
    "clip": False,
}


@dataclass
class _Statistics:
    """What is observed of one block at full precision, by the first consumer of each fold.

    Attributes:
        amax: The largest |input| per channel, [K].
        mean_square: Mean of the squared input per channel, [K].
        wmax: The largest |weight| per channel over all consumers, [K].
    """

    amax: dict[str, torch.Tensor]
    mean_square: dict[str, torch.Tensor]
    wmax: dict[str, torch.Tensor]

    @classmethod
    def taken(cls, kept: dict[str, torch.Tensor], index: int, device: torch.device) -> Self:
        """Return those of one block from tensors named ``<index>:<statistic>:<linear>``."""
        found: dict[str, dict[str, torch.Tensor]] = {"amax": {}, "mean_square": {}, "wmax": {}}
        for key, tensor in kept.items():
            block, _, rest = key.partition(":")
            if block == str(index):
                statistic, _, name = rest.partition(":")
                found[statistic][name] = tensor.to(device)
        return cls(**found)


class SmoothQuantPlus:
    """Fold ``s = amax^alpha / wmax^(1-alpha)`` into norms (and v_proj, up_proj), then round.

    Smoothing is for rounding to nearest. The default is GPTQ without it. Where it smooths, one
    alpha serves the whole model. It minimizes the top-k KL divergence of the next-token
    distribution on the calibration text, with every block running on the output of the quantized
    block before it. That costs about 7 passes over half of the calibration text, with rounding.
    Limits: dense decoders of ``architecture.ARCHITECTURES``.
    """

    name: ClassVar[str] = "smoothquant_plus"
    revision: ClassVar[int] = 3
    settings_type: ClassVar[type[GridSettings]] = SmoothQuantPlusSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        calibrates=True,
        at_load=True,
        formats=("compressed-tensors", "awq"),
        paper="https://arxiv.org/abs/2312.03788",
    )

    def __init__(self, settings: SmoothQuantPlusSettings) -> None:
        self.settings = settings

    @torch.no_grad()
    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Observe the model, search alpha unless it is fixed, and search the clipping."""
        folds = blocks.arch.folds(blocks.model.config)
        self.first_sharing = blocks.arch.first_sharing(blocks.model.config)
        self.grids = self.settings.grids(blocks.model.config)
        self.scale_dtype = blocks.scale_dtype
        self.folds = [
            [fold for fold in folds if self._smooths(fold, self._grids(blocks, index))]
            for index in range(len(blocks))
        ]
        if self.settings.smoothed == "none" and not self._clips:
            return Plan(self.name, self.grids)
        kept = blocks.stages.tensors("statistics", lambda: self._observe(blocks, progress))
        final = kept["final"].to(blocks.device)
        self.statistics = [_Statistics.taken(kept, i, blocks.device) for i in range(len(blocks))]
        report: dict[str, Any] = {}
        alpha = self.settings.alpha if self.settings.smoothed != "none" else 0.0
        if alpha is None:
            coarse = 0.2 if self.settings.search == "coarse" else 0.05
            half = blocks.first(max(1, len(final) // 2)) if coarse > 0.05 else blocks
            reference = NextTokenReference(
                blocks.model, blocks.arch.layers_prefix, final[: len(half.tokens)]
            )
            tried = 0

            def loss(alpha: float) -> float:
                nonlocal tried
                tried += 1
                progress(f"alpha {alpha:.2f} ({tried})", tried, 7 if coarse > 0.05 else 21)
                return blocks.stages.number(
                    f"alpha {alpha:.2f}",
                    lambda: reference.divergence(self._propagate(half, alpha)),
                )

            alpha, curve = search_alpha(loss, coarse=coarse)
            report["loss_curve"] = {f"{a:.2f}": value for a, value in curve.items()}
        if self.settings.smoothed != "none":
            report["alpha"] = alpha
        return self._assemble(blocks, alpha, report, progress)

    @property
    def _clips(self) -> bool:
        """Whether ranges are searched here, and not by the rounding."""
        return self.settings.clip and self.settings.rounding == "nearest"

    def _grids(self, blocks: Blocks, index: int) -> dict[str, Grid]:
        return layer_grids(self.grids, blocks.prefix(index))

    def _smooths(self, fold: Fold, grids: dict[str, Grid]) -> bool:
        """Whether a fold is wanted, and all linears that it changes are quantized."""
        smoothed = self.settings.smoothed
        wanted = smoothed == "all" or (smoothed == "norms" and fold.from_norm)
        changed = fold.consumers if fold.from_norm else (*fold.consumers, fold.producer)
        return wanted and all(name in grids for name in changed)

    def _observe(self, blocks: Blocks, progress: Progress) -> dict[str, torch.Tensor]:
        """Return the statistics of each block at full precision, and ``final``, the last output."""
        kept: dict[str, torch.Tensor] = {}
        hidden, watched = blocks.inputs(), set(self.first_sharing.values())
        for index in range(len(blocks)):
            progress("activations", index + 1, len(blocks))
            maxima, energies = Maxima(watched), Energies(watched)
            with blocks.resident(index) as block:
                hidden = blocks.run(index, hidden, (maxima, energies), out=hidden)
                for name in watched:
                    kept[f"{index}:amax:{name}"] = maxima.value(name)
                    kept[f"{index}:mean_square:{name}"] = energies.value(name)
                for fold in self.folds[index]:
                    weights = [block.get_submodule(c).weight for c in fold.consumers]
                    wmax = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
                    kept[f"{index}:wmax:{fold.consumers[0]}"] = wmax
        return kept | {"final": hidden}

    def _vectors(self, index: int, alpha: float) -> dict[Fold, torch.Tensor]:
        """Return the smoothing vector of each fold of a block, by channel of its producer."""
        seen = self.statistics[index]
        return {
            fold: smoothing_vector(
                to_producer(fold, seen.amax[fold.consumers[0]]),
                to_producer(fold, seen.wmax[fold.consumers[0]]),
                alpha,
            )
            for fold in self.folds[index]
        }

    def _propagate(self, blocks: Blocks, alpha: float) -> torch.Tensor:
        """Return the last hidden states with every block quantized at ``alpha``.

        Norms are left alone, and weights are divided back after rounding, which is the same
        function. The scale of an output row passes into its groups' scales and changes no rounding.
        """
        hidden = blocks.inputs()
        for index in range(len(blocks)):
            vectors = self._vectors(index, alpha)
            inputs = {c: to_consumer(f, v) for f, v in vectors.items() for c in f.consumers}
            with blocks.resident(index) as block:
                weights = {}
                for name, grid in self._grids(blocks, index).items():
                    weight, scale = block.get_submodule(name).weight.float(), inputs.get(name)
                    if scale is not None:
                        weight = weight * scale
                    shrink = None
                    if self.settings.clip and self.settings.search == "full":
                        shrink = self._clip_percents(index, name, weight, scale, grid).float() / 100
                    weights[name] = fake_quantize(weight, grid, shrink, self.scale_dtype)
                    if scale is not None:
                        weights[name].div_(scale)
                with blocks.replaced(index, weights):
                    hidden = blocks.run(index, hidden, out=hidden)
        return hidden

    def _assemble(
        self, blocks: Blocks, alpha: float, report: dict[str, Any], progress: Progress
    ) -> Plan:
        plan = Plan(self.name, self.grids, report=report)
        for index in range(len(blocks)):
            progress("clip search" if self._clips else "folds", index + 1, len(blocks))
            prefix = blocks.prefix(index)
            with blocks.resident(index) as block:
                for fold, vector in self._vectors(index, alpha).items():
                    add_fold(plan, blocks, index, fold, vector)
                if self._clips:
                    plan.shrinks |= blocks.stages.tensors(
                        f"clip {index}",
                        partial(self._clip, plan, prefix, index, block),
                    )
        plan.vectors = {name: vector.cpu() for name, vector in plan.vectors.items()}
        return plan

    def _clip(
        self, plan: Plan, prefix: str, index: int, block: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Search the clipping of every quantized linear of a block, by full name."""
        percents = {}
        for name, grid in plan.layer_grids(prefix).items():
            weight = plan.smoothed(prefix + name, block.get_submodule(name).weight)
            scale = plan.vectors.get(f"{prefix}{name}.input")
            percents[prefix + name] = self._clip_percents(index, name, weight, scale, grid).cpu()
        return percents

    def _clip_percents(
        self,
        index: int,
        name: str,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        grid: Grid,
    ) -> torch.Tensor:
        """Search the clipping of a smoothed weight, whose inputs became ``scale`` times smaller."""
        mean_square = self.statistics[index].mean_square[self.first_sharing[name]]
        if scale is not None:
            mean_square = mean_square / scale.square()
        return clip_percents(weight, grid, mean_square, self.scale_dtype)
