# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant+: one smoothing strength for the whole model, then group-wise rounding.

By default GPTQ rounds and nothing is smoothed, which lost less wherever it was measured.

Paper: SmoothQuant+: Accurate and Efficient 4-bit Post-Training Weight Quantization for LLM,
https://arxiv.org/abs/2312.03788
"""

from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import NextTokenReference
from compress_common.progress import Progress, silent
from quant_methods.base import Capabilities, GridSettings
from quant_methods.formats.plan import Plan
from quant_methods.roundings.base import Rounding
from quant_methods.roundings.gptq import GPTQ
from quant_methods.transforms.smoothed_decoder import Smoothed, SmoothedDecoder
from quant_methods.transforms.smoothing import add_fold, search_alpha


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
    folds: Smoothed | None = Field(
        None,
        description="smooth nothing, norm-fed linears only (paper), or o_proj and down_proj too; "
        "unset: norms with rounding=nearest or a given alpha, else none",
    )
    clip: bool = Field(True, description="narrow each group's range where that lowers the error")

    @property
    def smoothed(self) -> Smoothed:
        """What is smoothed, when ``folds`` leaves it open."""
        if self.folds is not None:
            return self.folds
        return "norms" if self.rounding == "nearest" or self.alpha is not None else "none"

    @property
    def keeps_inputs(self) -> bool:
        """See the base class: nothing is smoothed."""
        return self.smoothed == "none"

    @property
    def needs_head(self) -> str | None:
        """See the base class."""
        if self.smoothed == "none" or self.alpha is not None:
            return None
        return "alpha is searched by the loss of next tokens: give alpha, or leave folds at none"

    def identity(self) -> dict[str, Any]:
        """See the base class. What is smoothed counts, not how that was said."""
        content = super().identity() | {"folds": self.smoothed}
        if self.smoothed == "none" or self.alpha is not None:
            del content["search"]
        return content

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> Self:
        if self.folds == "none" and self.alpha is not None:
            raise ValueError("`alpha` smooths, and folds=none does not; remove one of them")
        if "search" in self.model_fields_set and self.search == "full":
            if self.smoothed == "none":
                raise ValueError(
                    "`search` chooses how much is smoothed, and nothing is; give folds=norms, or "
                    "remove it"
                )
            if self.alpha is not None:
                raise ValueError("`search` chooses alpha, which is given; remove one of them")
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


class SmoothQuantPlus:
    """Fold ``s = amax^alpha / wmax^(1-alpha)`` into norms (and v_proj, up_proj), then round.

    Smoothing is for rounding to nearest. The default is GPTQ without it. Where it smooths, one
    alpha serves the whole model. It minimizes the top-k KL divergence of the next-token
    distribution on the calibration text, with every block running on the output of the quantized
    block before it. That costs about 7 passes over half of the calibration text, with rounding.
    Limits: dense decoders, and folds that ``transforms.prove`` proves on them.
    """

    name: ClassVar[str] = "smoothquant_plus"
    revision: ClassVar[int] = 5
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
        settings = self.settings
        plan = Plan(self.name, settings.grids(blocks.model.config))
        clips = settings.clip and settings.rounding == "nearest"  # else the rounding does
        if settings.smoothed == "none" and not clips:
            return plan
        everyone = settings.experts == "all"
        decoder = SmoothedDecoder(blocks, plan.grids, settings.smoothed, progress, everyone)
        alpha = settings.alpha
        if settings.smoothed != "none":
            if alpha is None:
                alpha, curve = self._searched_alpha(blocks, decoder, progress)
                plan.report["loss_curve"] = {f"{a:.2f}": value for a, value in curve.items()}
            plan.report["alpha"] = alpha
        for index in range(len(blocks)):
            progress("clip search" if clips else "folds", index + 1, len(blocks))
            with blocks.resident(index) as block:
                for fold, vector in decoder.vectors(index, alpha or 0.0).items():
                    add_fold(plan, blocks, index, fold, vector)
                if clips:
                    plan.shrinks |= blocks.stages.tensors(
                        f"clip {index}",
                        partial(_clipped, plan, decoder, blocks.prefix(index), index, block),
                    )
        plan.vectors = {name: vector.cpu() for name, vector in plan.vectors.items()}
        return plan

    def _searched_alpha(
        self, blocks: Blocks, decoder: SmoothedDecoder, progress: Progress
    ) -> tuple[float, dict[float, float]]:
        """Return the alpha with the least loss, and the loss of each that was tried."""
        full = self.settings.search == "full"
        part = blocks if full else blocks.first(max(1, len(decoder.final) // 2))
        reference = NextTokenReference(
            blocks.model, blocks.structure, decoder.final[: len(part.tokens)]
        )
        tried = 0

        def loss(alpha: float) -> float:
            nonlocal tried
            tried += 1
            progress(f"alpha {alpha:.2f} ({tried})", tried, 21 if full else 7)
            return blocks.stages.number(
                f"alpha {alpha:.2f}",
                lambda: reference.divergence(
                    decoder.propagated(part, alpha, clip=full and self.settings.clip)
                ),
            )

        return search_alpha(loss, coarse=0.05 if full else 0.2)


def _clipped(
    plan: Plan, decoder: SmoothedDecoder, prefix: str, index: int, block: nn.Module
) -> dict[str, torch.Tensor]:
    """Search the clipping of every quantized linear of a block, by full name."""
    percents = {}
    for name in plan.layer_grids(prefix):
        weight = plan.smoothed(prefix + name, block.get_submodule(name).weight)
        scale = plan.vectors.get(f"{prefix}{name}.input")
        percents[prefix + name] = decoder.clip_percents(index, name, weight, scale).cpu()
    return percents
