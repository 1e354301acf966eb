# SPDX-License-Identifier: Apache-2.0
"""The interface of a weight-quantization method: settings, capabilities, and ``plan``."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError, joined
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from compress_common.structure.layer_structure import Unit
from compress_common.structure.structure import Structure
from quant_methods.allocators.allocation import read_allocation
from quant_methods.formats.plan import Plan
from quant_methods.grid import GROUP_SIZES, PER_CHANNEL, SIXTEEN, Grid, pick_group_size
from quant_methods.roundings.base import Rounding
from quant_methods.roundings.gptq import GPTQ
from quant_methods.roundings.nearest import Nearest

_WORD_BITS = 32  # zero points are packed along the output channels, in whole words
# Models whose vLLM class lets a quantization method make its embedding.
_EMBEDDINGS_SERVED = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_KERNEL_OUTPUTS = 16  # the CPU kernels take whole tiles of output channels


class GridSettings(BaseModel):
    """Settings that all methods share. Smaller groups give better quality and take more bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(
        4,
        ge=2,
        le=8,
        description="bits of a weight; on a CPU vLLM serves 4, and 8 as w8a8",
    )
    group_size: Literal[32, 64, 128] = Field(
        128, description="input channels per scale; the largest of 128, 64, 32 up to this that fits"
    )
    symmetric: bool = Field(
        False, description="no zero points: slightly smaller, 0.03 to 0.1 nats worse"
    )
    eight_bit: Literal["w8a8", "w8a16"] = Field(
        "w8a8",
        description="how units of 8 bits are stored: w8a8 (int8 with one scale per channel, "
        "activations rounded to int8 per token; CPU and CUDA) or w8a16 (groups; CUDA only)",
    )
    allocation: str | None = Field(
        None,
        description="file with the bits of each unit, {unit: bits}; 16 leaves a unit as it is. "
        "Units that it does not name have `bits`",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: later columns compensate the rounding error of each column; better with "
        "enough calibration text (8,000 tokens), takes minutes and stores codes as large as the "
        "quantized model",
    )
    experts: Literal["routed", "all"] = Field(
        "routed",
        description="tokens that calibrate a routed expert of a mixture: those that go to it, and "
        "others up to four times the group size; or all, which takes as many times longer as there "
        "are experts for each that a token goes to",
    )
    embeddings: Literal["none", "int8", "int4"] = Field(
        "none",
        description="bits of the token embedding and lm_head, tied or not: int8 has one scale per "
        "token, int4 symmetric groups. Needs this plugin to serve it, on a CPU",
    )
    uniform: bool = Field(
        False, description="one group size for all linears, as the AWQ format needs"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that o_proj and down_proj are cut for: no group is cut in two"
    )

    def identity(self) -> dict[str, Any]:
        """Return all that decides a plan: the settings, with the bits of the allocation's file.

        Embeddings are rounded to nearest whatever the plan, so they are left out.

        Raises:
            CompressError: A file cannot be read.
        """
        content = self.model_dump(exclude={"embeddings"})
        if self.allocation is not None:
            content["allocation"] = read_allocation(self.allocation).bits
        return content

    @property
    def keeps_inputs(self) -> bool:
        """Whether linears get and give what they did, as adapters of the original model need.

        False where a method does not say. One that never changes them has ``smooths=False``.
        """
        return False

    @property
    def needs_head(self) -> str | None:
        """What these settings need a language-model head for, and what to set else; None: nothing.

        Models that embed or classify have none.
        """
        return None

    def check_model(self, weights_digest: str) -> None:
        """Raise CompressError when the allocation is of a model with other weights.

        Args:
            weights_digest: ``Checkpoint.weights_digest``.
        """
        if self.allocation is not None:
            read_allocation(self.allocation).check_model(weights_digest)

    def rounder(self) -> Rounding:
        """Return the rounding that the settings name."""
        return GPTQ() if self.rounding == "gptq" else Nearest()

    def grids(self, config: Any) -> dict[str, Grid]:
        """Choose the grid of each linear of a decoder.

        A linear is left out, and so stays at 16 bits, when no group size divides its input, when
        its codes do not pack, or when the allocation says so. Linears that vLLM fuses are left out
        together.

        Args:
            config: The text model's ``transformers`` config.

        Returns:
            ``{linear: grid}`` by full name.

        Raises:
            CompressError: Nothing can be quantized, the ranks do not divide a linear, or the
                allocation does not suit.
        """
        structure = structure_of(config)
        units, shapes = structure.all_units, structure.shapes
        bits = dict.fromkeys(units, self.bits)
        if self.allocation is not None:
            allocation = read_allocation(self.allocation)
            allocation.check_grid(self.model_dump())
            bits |= allocation.checked(units)
        sizes = {
            unit: self._group_size(structure.unit(unit), structure, count)
            for unit, count in bits.items()
            if count != SIXTEEN
        }
        fit = {unit: size for unit, size in sizes.items() if size is not None}
        if self.allocation is not None:
            allocation.check_packs(fit, self.tensor_parallel)
        if not sizes:
            raise CompressError("the allocation leaves every unit at 16 bits: nothing to quantize")
        if not fit:
            inputs = sorted({inputs for _, inputs in shapes.values()})
            raise CompressError(
                f"no linear can be quantized: none of the group sizes {GROUP_SIZES} up to "
                f"{self.group_size} divides an input size of {inputs} on {self.tensor_parallel} "
                "ranks; serve the model at 16 bits"
            )
        if self.uniform:
            fit = dict.fromkeys(fit, min(fit.values()))
        return {
            linear: self.grid(bits[unit], size)
            for unit, size in fit.items()
            for linear in units[unit]
        }

    def embedding_grid(self, config: Any) -> Grid | None:
        """Return the grid of the token embedding and lm_head; None: they stay at 16 bits.

        Symmetric, because vLLM cuts the vocabulary between ranks, and zero points are packed along
        it.

        Args:
            config: The text model's ``transformers`` config.

        Raises:
            CompressError: vLLM cannot serve such an embedding of this model.
        """
        if self.embeddings == "none":
            return None
        size, problems = pick_group_size(config.hidden_size, self.group_size), []
        if config.model_type not in _EMBEDDINGS_SERVED:
            problems.append(
                f"embeddings={self.embeddings}: vLLM's {config.model_type} model takes no "
                f"quantized embedding, or none was tested; models that do: "
                f"{', '.join(_EMBEDDINGS_SERVED)}. Set embeddings=none"
            )
        if hasattr(config, "wrapper"):
            problems.append(
                f"embeddings={self.embeddings}: quantized embeddings were never tested with a "
                f"model around the language model ({config.wrapper.model_type}); set "
                "embeddings=none"
            )
        if size is None:
            problems.append(
                f"embeddings={self.embeddings} needs a hidden size that is a multiple of "
                f"{GROUP_SIZES[-1]}, not {config.hidden_size}; set embeddings=none"
            )
        if problems:
            raise joined(problems)
        assert size is not None
        if self.embeddings == "int8":
            return Grid(PER_CHANNEL, symmetric=True, bits=8)
        return Grid(size, symmetric=True)

    def grid(self, bits: int, group_size: int) -> Grid:
        """Return the grid of a level of ``bits`` bits whose groups have ``group_size`` channels."""
        if bits == 8 and self.eight_bit == "w8a8":
            return Grid(PER_CHANNEL, symmetric=True, bits=8, activations="int8")
        return Grid(group_size, self.symmetric, bits)

    def _group_size(self, unit: Unit, structure: Structure, bits: int) -> int | None:
        """Return the group size that the linears of a unit share; None: they stay at 16 bits."""
        shapes, ranks = structure.shapes, self.tensor_parallel
        sizes: set[int | None] = set()
        # Each shape once: a layer can have hundreds of experts.
        alike = {(shapes[n], n in structure.row_parallel): n for n in unit.linears}
        for (_, row), name in alike.items():
            inputs = shapes[name][1]
            outputs = [shapes[n][0] for n in unit.linears if shapes[n][1] == inputs]
            if row:
                if inputs % ranks:
                    raise CompressError(
                        f"{name} has {inputs} input channels, which {ranks} ranks do not divide; "
                        "change the tensor parallel size"
                    )
                inputs //= ranks
            else:  # vLLM repeats key and value heads that are fewer than the ranks
                outputs = [size if size % ranks else size // ranks for size in outputs]
            if sum(outputs) % _KERNEL_OUTPUTS or any(size * bits % _WORD_BITS for size in outputs):
                return None
            sizes.add(pick_group_size(inputs, self.group_size))
        return None if None in sizes else min(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Capabilities:
    """What a method can do. ``vllm-compress methods`` shows it.

    Attributes:
        calibrates: Whether it needs calibration text.
        at_load: Whether an engine can run it while it loads a 16-bit checkpoint.
        formats: Checkpoint formats that hold its result.
        paper: Address of the paper, or "".
        smooths: Whether some settings rescale or rotate weights. LoRA adapters of the original
            model then do not fit, unless ``GridSettings.keeps_inputs`` says that these do not.
    """

    calibrates: bool
    at_load: bool
    formats: tuple[str, ...]
    paper: str
    smooths: bool = True


class QuantMethod(Protocol):
    """Turns a model and calibration tokens into a Plan."""

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
