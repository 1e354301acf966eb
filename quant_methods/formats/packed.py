# SPDX-License-Identifier: Apache-2.0
"""A rounded weight as it is stored: packed codes, in memory or in a mapped file."""

from dataclasses import dataclass
from typing import Self

import torch

from quant_methods.formats.packing import pack, unpack
from quant_methods.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class PackedWeight:
    """A ``QuantizedWeight`` in as few bytes as its codes have bits.

    Attributes:
        words: Packed codes, int32 [N, K*bits/32].
        scale: fp32 [N, K/group].
        zero: Zero points, uint8 [N, K/group].
        grid: How it was rounded.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: Grid

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Self:
        """Pack a weight."""
        words = pack(weight.q, bits=weight.grid.bits)
        return cls(words, weight.scale.contiguous(), weight.zero.to(torch.uint8), weight.grid)

    def to(self, device: str | torch.device) -> Self:
        """Return the same weight on another device."""
        tensors = (self.words.to(device), self.scale.to(device), self.zero.to(device))
        return type(self)(*tensors, self.grid)

    def unpacked(self) -> QuantizedWeight:
        """Return the weight with one byte per code."""
        codes = unpack(self.words, bits=self.grid.bits)
        return QuantizedWeight(codes, self.scale, self.zero.float(), self.grid)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return what a file stores of it under a name."""
        return {f"codes:{name}": self.words, f"scale:{name}": self.scale, f"zero:{name}": self.zero}

    @classmethod
    def taken(cls, name: str, tensors: dict[str, torch.Tensor], grid: Grid) -> Self:
        """Return the weight that ``tensors(name)`` stored."""
        words, scale = tensors[f"codes:{name}"], tensors[f"scale:{name}"]
        return cls(words, scale, tensors[f"zero:{name}"], grid)


def packed_bytes(grid: Grid, outputs: int, inputs: int) -> int:
    """Return the bytes of the tensors of a ``PackedWeight``.

    Args:
        grid: How the weight is rounded.
        outputs: N of the weight [N, K].
        inputs: K.
    """
    per_group = 4 + 1  # scale and zero point
    return outputs * (inputs * grid.bits // 8 + grid.groups(inputs) * per_group)
