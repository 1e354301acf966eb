# SPDX-License-Identifier: Apache-2.0
"""What a weight-quantisation method is: its settings, its declared abilities, one verb."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from compress_common.errors import CompressError
from quant_methods.architecture import ROW_PARALLEL, linear_shapes
from quant_methods.blocks import Blocks
from quant_methods.grid import Grid, pick_group_size
from quant_methods.plan import Plan


class GridSettings(BaseModel):
    """Settings every method shares. Smaller groups: better quality, more bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_size: Literal[32, 64, 128] = Field(
        128, description="input channels per scale; the largest of 128, 64, 32 up to this that fits"
    )
    symmetric: bool = Field(
        False, description="no zero points: slightly smaller, 0.03 to 0.1 nats worse"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: each column's error is made up for by later ones; better with enough "
        "calibration text (8,000 tokens), minutes, and a cache as large as the int4 model",
    )
    uniform: bool = Field(
        False, description="one group size for all linears, as the AWQ format needs"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that o_proj and down_proj are cut for: no group is cut in two"
    )

    def grids(self, config: Any) -> dict[str, Grid]:
        """The grid of each linear of a decoder layer, from the model's config."""
        sizes = {}
        for name, (_, in_features) in linear_shapes(config).items():
            ranks = self.tensor_parallel if name in ROW_PARALLEL else 1
            if in_features % ranks:
                raise CompressError(
                    f"{name} has {in_features} input channels, which {ranks} ranks do not divide; "
                    "change the tensor parallel size"
                )
            sizes[name] = pick_group_size(in_features // ranks, self.group_size)
        if self.uniform:
            sizes = dict.fromkeys(sizes, min(sizes.values()))
        return {name: Grid(size, self.symmetric) for name, size in sizes.items()}


@dataclass(frozen=True)
class Capabilities:
    """What a method can do: shown by ``vllm-compress methods``, checked before work starts."""

    calibrates: bool
    at_load: bool
    formats: tuple[str, ...]
    paper: str


class Progress(Protocol):
    """Called as a long step advances: ``progress(step, done, total)``."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """The progress of a caller that shows none."""


class QuantMethod(Protocol):
    """Turns a model and calibration tokens into a Plan; the rounding itself is shared."""

    name: ClassVar[str]
    revision: ClassVar[int]  # raised when the same settings would give another plan than before
    settings_type: ClassVar[type[GridSettings]]
    capabilities: ClassVar[Capabilities]
    settings: Any

    def __init__(self, settings: Any) -> None: ...

    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Decide smoothing and grids for every linear of the decoder in ``blocks``."""
        ...
