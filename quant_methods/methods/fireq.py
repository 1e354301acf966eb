# SPDX-License-Identifier: Apache-2.0
"""FireQ: int4 weights multiplied with FP8 activations.

Paper: FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration,
https://arxiv.org/abs/2505.20839
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError, joined
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from compress_common.structure.layer_structure import Unit
from compress_common.structure.structure import Structure
from quant_methods.base import Capabilities, GridSettings
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid
from quant_methods.transforms.rope_keys import ScaleKeys, check_keys
from quant_methods.transforms.weight_folds import WeightFolds

_TILE = 128  # both sides of a weight are whole multiples of it


class FireQSettings(GridSettings):
    """Settings. The paper has ``rounding="nearest"``."""

    bits: Literal[4] = Field(4, description="the kernel takes nothing else")
    group_size: Literal[128] = Field(128, description="the kernel takes nothing else")
    symmetric: Literal[True] = Field(True, description="the kernel takes nothing else")
    rounding: Literal["nearest", "gptq"] = Field(
        "gptq", description="as in the other methods; nearest is the paper's"
    )
    folds: bool = Field(
        True,
        description="scale the channels of the MLP by the mean of their weights, folded into the "
        "norm and up_proj",
    )
    key_scale: float | None = Field(
        8.0,
        gt=0,
        description="largest norm of a rotary pair of the keys on the calibration text; an FP8 KV "
        "cache rounds such keys well; null: keys are left alone",
    )

    def grids(self, config: Any) -> dict[str, Grid]:
        """See the base class. Also lists what keeps vLLM's kernel from the model."""
        problems = []
        if self.tensor_parallel > 1:
            problems.append(
                f"fireq rounds scales as one rank does, not {self.tensor_parallel}: vLLM rounds "
                "those of each rank on their own; quantize and serve with tensor parallel size 1"
            )
        if str(getattr(config, "dtype", None)) in ("float16", "torch.float16"):
            problems.append(
                "fireq needs bfloat16 outputs, and the checkpoint is float16; convert it to "
                "bfloat16 first"
            )
        try:
            if structure_of(config).has_experts:
                problems.append("fireq was not tested with routed experts; use another method")
            if self.key_scale is not None:
                check_keys(config)
        except CompressError as error:
            problems += error.problems
        if problems:
            raise joined(problems)
        structure = structure_of(config)
        units = {unit.name: unit for kind in structure.kinds for unit in kind.units}.values()
        if all(self._group_size(unit, structure, self.bits) is None for unit in units):
            raise CompressError(
                f"fireq needs linears whose inputs and outputs are multiples of {_TILE}, and the "
                f"model has none: hidden size {config.hidden_size}, intermediate size "
                f"{config.intermediate_size}"
            )
        return super().grids(config)

    def grid(self, bits: int, group_size: int) -> Grid:
        """See the base class."""
        if bits != 4:
            raise CompressError(f"fireq has units of 4 and of 16 bits, not of {bits}")
        return Grid(group_size, symmetric=True, bits=4, activations="fp8")

    def _group_size(self, unit: Unit, structure: Structure, bits: int) -> int | None:
        outputs = sum(structure.shapes[name][0] for name in unit.linears)
        size = super()._group_size(unit, structure, bits)
        return size if size == self.group_size and outputs % _TILE == 0 else None


class FireQ:
    """Fold channel scales out of the MLP and the keys, then round to int4 with FP8 scales.

    Codes are chosen against the FP8 numbers that vLLM's kernel makes of the scales. Left out: the
    paper's factors behind RoPE, its scaling of o_proj, and its int4 KV cache. Limits: served on
    Hopper GPUs (capability 9.0), bfloat16, one rank; both sides of a unit divisible by 128; no norm
    on queries and keys.
    """

    name: ClassVar[str] = "fireq"
    revision: ClassVar[int] = 3
    settings_type: ClassVar[type[GridSettings]] = FireQSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        calibrates=True,
        at_load=False,
        formats=("compressed-tensors",),
        paper="https://arxiv.org/abs/2505.20839",
    )

    def __init__(self, settings: FireQSettings) -> None:
        self.settings = settings

    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Add the folds. Codes follow, as the setting ``rounding`` says."""
        plan = Plan(self.name, self.settings.grids(blocks.model.config))
        if self.settings.folds:
            WeightFolds().add(plan, blocks)
        if self.settings.key_scale is not None:
            ScaleKeys(self.settings.key_scale, progress).add(plan, blocks)
        return plan
