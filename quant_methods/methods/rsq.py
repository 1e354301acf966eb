# SPDX-License-Identifier: Apache-2.0
"""RSQ: rotate, weigh the calibration tokens, then quantize with GPTQ.

Paper: RSQ: Learning from Important Tokens Leads to Better Quantized LLMs,
https://arxiv.org/abs/2503.01820
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from quant_methods.base import Capabilities, GridSettings
from quant_methods.calibration.attention_received import AttentionReceived
from quant_methods.calibration.token_weights import ActivationNorm, FirstTokens, TokenWeights
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid
from quant_methods.roundings.base import Rounding
from quant_methods.roundings.blockwise import round_blocks
from quant_methods.roundings.gptq import GPTQ
from quant_methods.transforms.base import Transform
from quant_methods.transforms.rotation import (
    RotateHeads,
    RotateResidual,
    check_heads,
    check_residual,
)


class RSQSettings(GridSettings):
    """Settings. The paper has ``bits=3, symmetric=true, rotation=both, expansion=8, power=2`` (its
    code: 1), ``least_weight=0.01, order=stored, steps=unit``, and one scale per output channel.
    """

    rounding: Literal["gptq"] = Field("gptq", description="RSQ always compensates errors")
    token_weights: Literal["attention", "actnorm", "firstn", "uniform"] = Field(
        "attention",
        description="what makes a token count: the attention that it receives; controls: the norm "
        "of its hidden state, a place at the start of the sample, nothing",
    )
    power: Literal[1, 2] = Field(
        1, description="power of the weights in the Gram matrix: 1 in the paper's code, 2 in it"
    )
    least_weight: float = Field(
        0.5,
        gt=0,
        le=1,
        description="weight of the token that counts least, as a share of the largest; 1: all "
        "count alike. The paper has 0.01: the first token of a sample then outweighs most others",
    )
    first_share: float = Field(
        0.125, gt=0, le=1, description="of firstn: the share of a sample that counts in full"
    )
    rotation: Literal["none", "heads", "both"] = Field(
        "heads",
        description="heads: turn the values of each head. both: turn the residual stream too, "
        "which unties embeddings and so enlarges small models",
    )
    rotation_seed: int = Field(0, ge=0, description="seed of the rotations")
    expansion: int = Field(
        1,
        ge=1,
        le=32,
        description="copies of each sample, each shifted on by 1/expansion of its length, so that "
        "later text also stands where attention sinks; time and memory grow with it",
    )
    order: Literal["energy", "stored"] = Field(
        "energy", description="round inputs with much energy first, or in the order of the weight"
    )
    ranges: Literal["search", "minmax"] = Field(
        "search", description="search the range of each group, or take all of it"
    )
    steps: Literal["block", "unit"] = Field(
        "block",
        description="unit: each unit is calibrated on the rounded ones before it in its block "
        "(four passes in place of one)",
    )

    def rounder(self) -> Rounding:
        """Return GPTQ as the settings describe it."""
        return GPTQ(order=self.order, ranges=self.ranges)

    def grids(self, config: Any) -> dict[str, Grid]:
        """See the base class. Also refuses architectures that cannot be rotated."""
        if self.rotation != "none":
            check_heads(config)
        if self.rotation == "both":
            check_residual(config)
        if self.token_weights == "attention" and structure_of(config).attention is None:
            raise CompressError(
                f"{config.model_type} has latent attention (MLA), whose scores are not observed; "
                "set token_weights=uniform"
            )
        return super().grids(config)

    @property
    def needs_head(self) -> str | None:
        """See the base class."""
        if self.rotation != "both":
            return None
        return "rotation=both turns the last hidden states, which the head undoes: give heads"

    def weigher(self) -> TokenWeights | None:
        """Return what weighs tokens; None: all count alike."""
        if self.token_weights == "attention":
            return AttentionReceived(self.least_weight, self.power)
        if self.token_weights == "actnorm":
            return ActivationNorm(self.least_weight, self.power)
        if self.token_weights == "firstn":
            return FirstTokens(self.first_share, self.least_weight, self.power)
        return None

    def transforms(self) -> tuple[Transform, ...]:
        """Return the rotations."""
        heads, residual = RotateHeads(self.rotation_seed), RotateResidual(self.rotation_seed)
        return {"none": (), "heads": (heads,), "both": (heads, residual)}[self.rotation]


class RSQ:
    """GPTQ whose Gram matrices count tokens by the attention that they receive.

    Weights are taken in each block on the output of the quantized blocks before it, and stay the
    same for all linears of the block. Limits: dense decoders. A rotation of the residual stream
    needs one RMSNorm in front of the linears and none behind them (not Gemma 2 and 3), one of heads
    a v_proj and an o_proj.
    """

    name: ClassVar[str] = "rsq"
    revision: ClassVar[int] = 3
    settings_type: ClassVar[type[GridSettings]] = RSQSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        calibrates=True,
        at_load=False,
        formats=("compressed-tensors", "awq"),
        paper="https://arxiv.org/abs/2503.01820",
    )

    def __init__(self, settings: RSQSettings) -> None:
        self.settings = settings

    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Rotate, weigh and round block by block."""
        settings = self.settings
        plan = Plan(self.name, settings.grids(blocks.model.config))
        if settings.expansion > 1:
            tokens = expanded(blocks.tokens, settings.expansion)
            blocks = blocks.on(tokens)
        for transform in settings.transforms():
            transform.add(plan, blocks)
        round_blocks(
            plan,
            blocks,
            settings.rounder(),
            token_weights=settings.weigher(),
            by_unit=settings.steps == "unit",
            experts=settings.experts,
            progress=progress,
        )
        return plan


def expanded(tokens: torch.Tensor, copies: int) -> torch.Tensor:
    """Return each sample in several copies, each shifted on in a circle: dataset expansion.

    Args:
        tokens: int64 [samples, length].
        copies: How many; copy k is shifted by ``k * length / copies`` tokens.

    Returns:
        int64 [samples * copies, length]; the first copy of a sample is the sample.
    """
    length = tokens.shape[1]
    shifted = [tokens.roll(k * length // copies, dims=1) for k in range(copies)]
    return torch.stack(shifted, dim=1).flatten(0, 1)
