# SPDX-License-Identifier: Apache-2.0
"""The bit layouts that stock vLLM loads: compressed-tensors ``pack-quantized`` and AWQ GEMM."""

from typing import Literal

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from quant_methods.grid import Grid, QuantizedWeight

_PER_WORD = 8  # eight 4-bit codes in one int32
# AWQ interleaves the eight columns of a word in this order, lowest nibble first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def pack(codes: torch.Tensor, packed_dim: Literal[0, 1] = 1) -> torch.Tensor:
    """Pack codes in 0..15 [rows, cols] into int32, eight to a word, lowest bits first.

    Args:
        codes: Integers in any dtype that int8 can hold.
        packed_dim: The dimension that becomes eight times shorter.
    """
    # compressed-tensors takes signed codes and adds 8.
    signed = codes.to(torch.int8) - 8
    return pack_to_int32(signed, num_bits=4, packed_dim=packed_dim).contiguous()


def unpack(words: torch.Tensor, packed_dim: Literal[0, 1] = 1) -> torch.Tensor:
    """Return the codes, uint8, of words that ``pack`` wrote."""
    shape = list(words.shape)
    shape[packed_dim] *= _PER_WORD
    signed = unpack_from_int32(words, 4, torch.Size(shape), packed_dim)
    return (signed + 8).to(torch.uint8)


def to_compressed_tensors(
    weight: QuantizedWeight, scale_dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear in compressed-tensors' ``pack-quantized`` layout.

    ``weight_packed`` int32 [N, K/8], ``weight_scale`` [N, K/g], ``weight_shape`` int64 [2] and,
    when asymmetric, ``weight_zero_point`` int32 [N/8, K/g], packed along N.
    """
    tensors = {
        "weight_packed": pack(weight.q),
        "weight_scale": weight.scale.to(scale_dtype),
        "weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors["weight_zero_point"] = pack(weight.zero, packed_dim=0)
    return tensors


def from_compressed_tensors(tensors: dict[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
    """Inverse of ``to_compressed_tensors``."""
    scale = tensors["weight_scale"].float()
    if grid.symmetric:
        zero = torch.full_like(scale, 8)
    else:
        zero = unpack(tensors["weight_zero_point"], packed_dim=0).float()
    return QuantizedWeight(unpack(tensors["weight_packed"]), scale, zero, grid)


def to_awq(
    weight: QuantizedWeight, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear in AWQ's GEMM layout.

    ``qweight`` int32 [K, N/8], ``scales`` [K/g, N], ``qzeros`` int32 [K/g, N/8]. AWQ has no
    symmetric form, so a symmetric grid is written with every zero point at 8.
    """

    def interleave(codes: torch.Tensor) -> torch.Tensor:
        blocks = codes.to(torch.uint8).view(codes.shape[0], -1, _PER_WORD)
        return pack(blocks[..., _AWQ_ORDER].reshape(codes.shape))

    return {
        "qweight": interleave(weight.q.t().contiguous()),
        "scales": weight.scale.t().contiguous().to(scale_dtype),
        "qzeros": interleave(weight.zero.t().contiguous()),
    }


def from_awq(tensors: dict[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
    """Inverse of ``to_awq``."""

    def straighten(words: torch.Tensor) -> torch.Tensor:
        codes = unpack(words).view(words.shape[0], -1, _PER_WORD)
        return codes[..., _AWQ_INVERSE].flatten(1)

    scale = tensors["scales"].t().float().contiguous()
    zero = straighten(tensors["qzeros"]).t().float().contiguous()
    return QuantizedWeight(straighten(tensors["qweight"]).t().contiguous(), scale, zero, grid)
