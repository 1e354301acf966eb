# SPDX-License-Identifier: Apache-2.0
"""The interface of a weight-quantization method: settings, capabilities, and ``plan``."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from compress_common.errors import CompressError
from quant_methods.architecture import ROW_PARALLEL, UNITS, linear_shapes
from quant_methods.calibration.blocks import Blocks
from quant_methods.formats.plan import Plan
from quant_methods.grid import GROUP_SIZES, Grid, pick_group_size

_PACKED_OUTPUTS = 8  # zero points are packed along the output channels, eight to a word
_KERNEL_OUTPUTS = 16  # the CPU kernels take whole tiles of output channels


class GridSettings(BaseModel):
    """Settings that all methods share. Smaller groups give better quality and take more bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_size: Literal[32, 64, 128] = Field(
        128, description="input channels per scale; the largest of 128, 64, 32 up to this that fits"
    )
    symmetric: bool = Field(
        False, description="no zero points: slightly smaller, 0.03 to 0.1 nats worse"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: later columns compensate the rounding error of each column; better with "
        "enough calibration text (8,000 tokens), takes minutes and stores codes as large as the "
        "int4 model",
    )
    uniform: bool = Field(
        False, description="one group size for all linears, as the AWQ format needs"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that o_proj and down_proj are cut for: no group is cut in two"
    )

    def grids(self, config: Any) -> dict[str, Grid]:
        """Choose the grid of each linear of a decoder layer.

        A linear is left out, and so stays at 16 bits, when no group size divides its input or its
        codes do not pack. Linears that vLLM fuses are left out together.

        Args:
            config: The text model's ``transformers`` config.

        Returns:
            ``{linear: grid}``. ``architecture.LINEARS`` has the names.

        Raises:
            CompressError: Nothing can be quantized, or the ranks do not divide a linear.
        """
        shapes = linear_shapes(config)
        sizes: dict[str, int] = {}
        for unit in UNITS:
            if (size := self._group_size(unit, shapes)) is not None:
                sizes |= dict.fromkeys(unit, size)
        if not sizes:
            inputs = sorted({inputs for _, inputs in shapes.values()})
            raise CompressError(
                f"no linear can be quantized: none of the group sizes {GROUP_SIZES} up to "
                f"{self.group_size} divides an input size of {inputs} on {self.tensor_parallel} "
                "ranks; serve the model at 16 bits"
            )
        if self.uniform:
            sizes = dict.fromkeys(sizes, min(sizes.values()))
        return {name: Grid(size, self.symmetric) for name, size in sizes.items()}

    def _group_size(self, unit: tuple[str, ...], shapes: dict[str, tuple[int, int]]) -> int | None:
        """Return the group size that the linears of a unit share; None: they stay at 16 bits."""
        ranks, inputs = self.tensor_parallel, shapes[unit[0]][1]
        outputs = [shapes[name][0] for name in unit]
        if unit[0] in ROW_PARALLEL:
            if inputs % ranks:
                raise CompressError(
                    f"{unit[0]} has {inputs} input channels, which {ranks} ranks do not divide; "
                    "change the tensor parallel size"
                )
            inputs //= ranks
        else:  # vLLM repeats key and value heads that are fewer than the ranks
            outputs = [size if size % ranks else size // ranks for size in outputs]
        if sum(outputs) % _KERNEL_OUTPUTS or any(size % _PACKED_OUTPUTS for size in outputs):
            return None
        return pick_group_size(inputs, self.group_size)


@dataclass(frozen=True)
class Capabilities:
    """What a method can do. ``vllm-compress methods`` shows it.

    Attributes:
        calibrates: Whether it needs calibration text.
        at_load: Whether an engine can run it while it loads a 16-bit checkpoint.
        formats: Checkpoint formats that hold its result.
        paper: Address of the paper, or "".
    """

    calibrates: bool
    at_load: bool
    formats: tuple[str, ...]
    paper: str


class Progress(Protocol):
    """Called as a step advances: ``progress(step, done, total)``."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """Show no progress."""


class QuantMethod(Protocol):
    """Turns a model and calibration tokens into a Plan. All methods share the rounding itself."""

    name: ClassVar[str]
    revision: ClassVar[int]  # raised when the same settings would give another plan than before
    settings_type: ClassVar[type[GridSettings]]
    capabilities: ClassVar[Capabilities]
    settings: Any

    def __init__(self, settings: Any) -> None: ...

    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Choose smoothing and grids for every linear of a decoder.

        Args:
            blocks: The decoder, with calibration tokens if the method calibrates. Slow parts go
                through ``blocks.stages``, so that an interrupted run can resume.
            progress: Called as the work advances.
        """
        ...
