# SPDX-License-Identifier: Apache-2.0
"""The bit layouts that stock vLLM loads: compressed-tensors and AWQ GEMM."""

from math import ceil
from typing import Literal

import torch
from torch.nn.functional import pad

from quant_methods.grid import PER_CHANNEL, Grid, QuantizedWeight

_WORD = 32  # bits
_CHUNK = 1 << 24  # codes packed at a time; each needs several bytes of temporaries
_AWQ_PER_WORD = 8  # eight 4-bit codes in one int32
# AWQ interleaves the eight columns of a word in this order, lowest nibble first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def pack(codes: torch.Tensor, packed_dim: Literal[0, 1] = 1, bits: int = 4) -> torch.Tensor:
    """Pack codes in 0..2^bits - 1 [rows, cols] densely into int32, lowest bits first.

    Codes of 3, 5, 6 or 7 bits cross from one word into the next, as vLLM reads them.
    compressed-tensors 0.17 leaves gaps instead, so it packs only 2, 4 and 8 bits here.

    Args:
        codes: Integers in any dtype that holds them exactly.
        packed_dim: The dimension that becomes ``32 / bits`` times shorter, rounded up.
        bits: Of a code.
    """
    if packed_dim == 1 and codes.numel() > _CHUNK and len(codes) > 1:
        rows = max(1, _CHUNK // codes.shape[1])
        return torch.cat([pack(part, bits=bits) for part in codes.split(rows)])
    if _WORD % bits == 0:
        # compressed-tensors takes signed codes and adds half of the range.
        signed = (codes.to(torch.int16) - (1 << bits >> 1)).to(torch.int8)
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        return pack_to_int32(signed, num_bits=bits, packed_dim=packed_dim).contiguous()
    rows = codes if packed_dim == 1 else codes.t()
    size = rows.shape[1]
    runs = pad(rows, (0, -size % _WORD)).reshape(len(rows), -1, _WORD)
    words = torch.zeros(*runs.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for place, (word, shift) in enumerate(_places(bits)):
        code = runs[..., place].to(torch.int32)
        words[..., word] |= code << shift
        if shift + bits > _WORD:
            words[..., word + 1] |= code >> _WORD - shift
    packed = words.flatten(1)[:, : ceil(size * bits / _WORD)]
    return (packed if packed_dim == 1 else packed.t()).contiguous()


def unpack(
    words: torch.Tensor, packed_dim: Literal[0, 1] = 1, bits: int = 4, size: int | None = None
) -> torch.Tensor:
    """Return the codes, uint8, of words that ``pack`` wrote.

    Args:
        words: int32 [rows, cols].
        packed_dim: As in ``pack``.
        bits: Of a code.
        size: Codes along ``packed_dim``; None: as many as the words hold.

    Raises:
        ValueError: There are fewer words than that.
    """
    whole = words.shape[packed_dim] * _WORD // bits
    if size is None:
        size = whole
    if size > whole:
        raise ValueError(f"{words.shape[packed_dim]} words have no {size} codes of {bits} bits")
    if _WORD % bits == 0:
        shape = list(words.shape)
        shape[packed_dim] = size
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32

        signed = unpack_from_int32(words, bits, torch.Size(shape), packed_dim)
        return (signed.to(torch.int16) + (1 << bits >> 1)).to(torch.uint8)
    needed = ceil(size * bits / _WORD)
    rows = (words if packed_dim == 1 else words.t())[:, :needed]
    runs = pad(rows, (0, -needed % bits)).reshape(len(rows), ceil(size / _WORD), bits)
    codes = torch.empty(*runs.shape[:2], _WORD, dtype=torch.uint8, device=words.device)
    for place, (word, shift) in enumerate(_places(bits)):
        code = runs[..., word] >> shift
        if shift + bits > _WORD:  # the shift repeats the sign, in bits that the next word fills
            code &= (1 << _WORD - shift) - 1
            code |= runs[..., word + 1] << _WORD - shift
        codes[..., place] = code & (1 << bits) - 1
    codes = codes.flatten(1)[:, :size]
    return (codes if packed_dim == 1 else codes.t()).contiguous()


def _places(bits: int) -> list[tuple[int, int]]:
    """Return the word and the lowest bit of each of the 32 codes that fill ``bits`` words."""
    return [divmod(place * bits, _WORD) for place in range(_WORD)]


def to_compressed_tensors(
    weight: QuantizedWeight, scale_dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear in a layout of compressed-tensors.

    ``pack-quantized``: ``weight_packed`` int32 [N, K*bits/32], ``weight_scale`` [N, K/g],
    ``weight_shape`` int64 [2] and, when asymmetric, ``weight_zero_point`` int32 [N*bits/32, K/g],
    packed along N. ``int-quantized``, for 8 bits per channel with int8 activations: ``weight``
    int8 [N, K] and ``weight_scale`` [N, 1].
    """
    grid = weight.grid
    if not grid.packed:
        return {
            "weight": (weight.q.to(torch.int16) - grid.middle).to(torch.int8),
            "weight_scale": weight.scale.to(scale_dtype),
        }
    tensors = {
        "weight_packed": pack(weight.q, bits=grid.bits),
        "weight_scale": weight.scale.to(scale_dtype),
        "weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack(weight.zero, packed_dim=0, bits=grid.bits)
    return tensors


def from_compressed_tensors(tensors: dict[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
    """Inverse of ``to_compressed_tensors``."""
    scale = tensors["weight_scale"].float()
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle)
    else:
        zeros = tensors["weight_zero_point"]
        zero = unpack(zeros, packed_dim=0, bits=grid.bits, size=len(scale)).float()
    if "weight" in tensors:
        q = (tensors["weight"].to(torch.int16) + grid.middle).to(torch.uint8)
    else:
        size = None if grid.group_size == PER_CHANNEL else scale.shape[1] * grid.group_size
        q = unpack(tensors["weight_packed"], bits=grid.bits, size=size)
    return QuantizedWeight(q, scale, zero, grid)


def to_awq(
    weight: QuantizedWeight, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return the tensors of one 4-bit linear in AWQ's GEMM layout.

    ``qweight`` int32 [K, N/8], ``scales`` [K/g, N], ``qzeros`` int32 [K/g, N/8]. AWQ has no
    symmetric form, so a symmetric grid is written with every zero point at 8.
    """

    def interleave(codes: torch.Tensor) -> torch.Tensor:
        blocks = codes.to(torch.uint8).view(codes.shape[0], -1, _AWQ_PER_WORD)
        return pack(blocks[..., _AWQ_ORDER].reshape(codes.shape))

    return {
        "qweight": interleave(weight.q.t().contiguous()),
        "scales": weight.scale.t().contiguous().to(scale_dtype),
        "qzeros": interleave(weight.zero.t().contiguous()),
    }


def from_awq(tensors: dict[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
    """Inverse of ``to_awq``."""

    def straighten(words: torch.Tensor) -> torch.Tensor:
        codes = unpack(words).view(words.shape[0], -1, _AWQ_PER_WORD)
        return codes[..., _AWQ_INVERSE].flatten(1)

    scale = tensors["scales"].t().float().contiguous()
    zero = straighten(tensors["qzeros"]).t().float().contiguous()
    return QuantizedWeight(straighten(tensors["qweight"]).t().contiguous(), scale, zero, grid)
