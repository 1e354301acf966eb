# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint's weights, at 16 bits and as int4, from the headers of its files.

Every figure for the weights' ratio that an engine reports, in its log and its metrics, comes from
here. No tensor is read.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from quant_methods.checkpoint import Checkpoint
from quant_methods.grid import Grid

# "checkpoint": as files and CUDA kernels have it. CPU kernels hold more per group: torch's int4
# GEMM two bfloat16, vLLM's AMX kernel a float32, an int32 and an int8.
Packing = Literal["checkpoint", "cpu-bf16", "cpu-int8"]
_CPU_GROUP_BYTES = {"cpu-bf16": 4, "cpu-int8": 9}
_PACKED = ("weight_packed", "qweight")
_ZEROS = ("weight_zero_point", "qzeros")
_SCALES = ("weight_scale", "scales")
_HALF = 2  # bytes
_PER_WORD = 8  # 4-bit codes in an int32
_SHAPE_BYTES = 16  # weight_shape, two int64


@dataclass(frozen=True)
class Sizes:
    """What a model's weights are made of.

    Attributes:
        linears: Number of int4 linears.
        weights: Elements in them.
        groups: Scales in them.
        zero_points: Whether each group has a zero point.
        rest: Elements of everything else, which stays at 16 bits.
    """

    linears: int
    weights: int
    groups: int
    zero_points: bool
    rest: int

    @property
    def original(self) -> int:
        """Bytes if everything has 16 bits."""
        return (self.weights + self.rest) * _HALF

    def compressed(self, packing: Packing = "checkpoint") -> int:
        """Return the bytes with int4 linears, packed as a kernel holds them."""
        if packing == "checkpoint":
            extra = self.linears * _SHAPE_BYTES + self.groups * _HALF
            extra += self.groups // 2 if self.zero_points else 0
        else:
            extra = self.groups * _CPU_GROUP_BYTES[packing]
        return self.weights // 2 + extra + self.rest * _HALF


def sizes_of(checkpoint: Checkpoint, grids: dict[str, Grid], tied: bool) -> Sizes:
    """Return the sizes of a 16-bit checkpoint, or of an int4 one in one of our formats.

    Args:
        checkpoint: What is measured.
        grids: ``{linear of a decoder layer: grid}`` for a 16-bit checkpoint; empty: nothing is
            quantized.
        tied: Whether the embedding is the head too. A second copy in the file is not counted.
    """
    linears = weights = groups = rest = 0
    zero_points = False
    for name, (shape, _) in checkpoint.shapes().items():
        module, _, kind = name.rpartition(".")
        grid = grids.get(_in_layer(module)) if kind == "weight" else None
        if grid is not None:
            linears += 1
            weights += prod(shape)
            groups += prod(shape) // grid.group_size
            zero_points |= not grid.symmetric
        elif kind in _PACKED:
            linears += 1
            weights += prod(shape) * _PER_WORD
        elif kind in _SCALES:
            groups += prod(shape)
        elif kind in _ZEROS:
            zero_points = True
        elif kind != "weight_shape" and not (tied and name == "lm_head.weight"):
            rest += prod(shape)
    return Sizes(linears, weights, groups, zero_points, rest)


def _in_layer(module: str) -> str:
    """``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``; "" outside decoder layers."""
    parts = module.split(".", 3)
    return parts[3] if module.startswith("model.layers.") and len(parts) == 4 else ""
