# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint's weights, at 16 bits and quantized, from the headers of its files.

Every figure for the weights' ratio that an engine reports, in its log and its metrics, comes from
here. ``sizes_of`` reads no tensor.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.structure.derive import structure_of
from compress_common.structure.structure import EMBEDDINGS, HEAD
from quant_methods.formats.checkpoint_formats import EMBEDDING_GROUP
from quant_methods.grid import Grid

# "checkpoint": as files and CUDA kernels have it. CPU kernels hold more per group: torch's int4
# GEMM two bfloat16, vLLM's AMX kernel a float32, an int32 and an int8.
Packing = Literal["checkpoint", "cpu-bf16", "cpu-int8"]
_CPU_GROUP_BYTES = {"cpu-bf16": 4, "cpu-int8": 9}
# Names of modules that predict further tokens, and of decoder layers by number.
_PREDICTING = re.compile(r"(?:.*\.)?mtp(?:_[a-z]+)?\.")
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.")
_PACKED = ("weight_packed", "qweight")
_ZEROS = ("weight_zero_point", "qzeros")
_SCALES = ("weight_scale", "scales")
_HALF = 2  # bytes
_WORD_BITS = 32
_SHAPE_BYTES = 16  # weight_shape, two int64


@dataclass(frozen=True)
class Sizes:
    """What a model's weights are made of.

    Attributes:
        linears: Number of quantized linears whose codes are packed.
        weights: Elements in quantized linears.
        code_bits: Bits of their codes.
        kernel_bits: Bits of their codes as CPU kernels hold them: 4 or 8 each.
        groups: Scales in them.
        zero_bits: Bits of their zero points.
        rest: Elements of everything else, which stays at 16 bits.
        embedding_groups: Scales of quantized embeddings among the groups.
    """

    linears: int
    weights: int
    code_bits: int
    kernel_bits: int
    groups: int
    zero_bits: int
    rest: int
    embedding_groups: int = 0

    @property
    def original(self) -> int:
        """Bytes if everything has 16 bits."""
        return (self.weights + self.rest) * _HALF

    def compressed(self, packing: Packing = "checkpoint") -> int:
        """Return the bytes with quantized linears, packed as a kernel holds them."""
        if packing == "checkpoint":
            codes = self.code_bits // 8
            extra = self.linears * _SHAPE_BYTES + self.groups * _HALF + self.zero_bits // 8
        else:
            codes = self.kernel_bits // 8
            extra = (self.groups - self.embedding_groups) * _CPU_GROUP_BYTES[packing]
            extra += self.embedding_groups * _CPU_GROUP_BYTES["cpu-bf16"]
        return codes + extra + self.rest * _HALF


def sizes_of(
    checkpoint: Checkpoint, grids: dict[str, Grid], tied: bool, embedding: Grid | None = None
) -> Sizes:
    """Return the sizes of a 16-bit checkpoint, or of a quantized one in one of our formats.

    Args:
        checkpoint: What is measured.
        grids: ``{linear: grid}`` by full name for a 16-bit checkpoint; empty: nothing is quantized.
        tied: Whether the embedding is the head too. A second copy in the file is not counted.
            Neither are layers that predict further tokens: vLLM loads them as a draft model alone.
        embedding: How the embeddings of a 16-bit checkpoint are quantized; None: they are not.
    """
    linears = weights = code_bits = kernel_bits = groups = zero_bits = rest = rows = 0
    if embedding is not None:
        grids = grids | dict.fromkeys(EMBEDDINGS, embedding)
    written = checkpoint.config.get("quantization_config") or {}
    depth = getattr(checkpoint.hf_config, "num_hidden_layers", None)
    for outer, (shape, size) in checkpoint.shapes().items():
        name = checkpoint.names.inner(outer) or outer
        if (tied and name == f"{HEAD}.weight") or predicts_further(name, depth):
            continue
        module, _, kind = name.rpartition(".")
        grid = grids.get(module) if kind == "weight" else None
        elements, bits = prod(shape), 0
        if grid is not None:
            count, bits = grid.groups(shape[1]) * shape[0], grid.bits
            groups += count
            rows += count if module in EMBEDDINGS else 0
            zero_bits += 0 if grid.symmetric else count * bits
            linears += grid.packed
        elif kind in _PACKED:
            bits = _written_bits(written, module)
            elements = elements * _WORD_BITS // bits
            linears += 1
        elif kind == "weight" and size == elements:  # int8 per channel
            bits = 8
        elif kind in _SCALES:
            groups += elements
            rows += elements if module in EMBEDDINGS else 0
        elif kind in _ZEROS:
            zero_bits += elements * _WORD_BITS
        elif kind != "weight_shape":
            rest += elements
        if bits:
            weights += elements
            code_bits += elements * bits
            kernel_bits += elements * (4 if bits <= 4 else 8)
    return Sizes(linears, weights, code_bits, kernel_bits, groups, zero_bits, rest, rows)


def predicts_further(name: str, depth: int | None) -> bool:
    """Whether a tensor is of layers that predict further tokens (MTP).

    Checkpoints have them under a name of their own, or behind the decoder's layers.

    Args:
        name: Of the tensor.
        depth: Number of decoder layers; None: it is not known.
    """
    if _PREDICTING.match(name):
        return True
    layer = _LAYER.match(name)
    return layer is not None and depth is not None and int(layer[1]) >= depth


def _written_bits(config: dict[str, Any], module: str) -> int:
    """Return the bits of a linear of a quantized checkpoint: one number, or that of its group."""
    groups = config.get("config_groups") or {}
    if module in EMBEDDINGS and EMBEDDING_GROUP in groups:
        return int(groups[EMBEDDING_GROUP]["weights"]["num_bits"])
    for group in groups.values():
        for target in group["targets"]:
            if target == "Linear" or re.match(target.removeprefix("re:"), module):
                return int(group["weights"]["num_bits"])
    return int(config.get("bits", 4))


def bits_per_weight(grids: dict[str, Grid], config: Any) -> float:
    """Return the stored bits per weight of a decoder's linears, scales and zero points included.

    Args:
        grids: ``{linear: grid}`` by full name. Linears without one have 16 bits.
        config: The text model's ``transformers`` config.
    """
    structure = structure_of(config)
    bits = weights = 0.0
    for linears in structure.all_units.values():
        for name in linears:
            outputs, inputs = structure.shape(name)
            grid = grids.get(name)
            bits += outputs * inputs * (grid.stored_bits(inputs) if grid else 16)
            weights += outputs * inputs
    return bits / weights
