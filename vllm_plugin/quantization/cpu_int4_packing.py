# SPDX-License-Identifier: Apache-2.0
"""Convert int4 weights from compressed-tensors' layout to those of torch and vLLM's AMX kernel.

Input: codes int32 [N, K/8], scales [N, K/g], zero points int32 [N/8, K/g], or None if every zero
point is 8. A weight is (code - zero point) * scale.
"""

import torch
from vllm import _custom_ops as ops

from quant_methods.formats.packing import pack, unpack

_CHUNK = 1 << 20  # weights packed at a time; each needs up to 16 bytes of temporaries
# Nibble i of a word of vLLM's W4A8 packer holds output 8 j + _W4A8_ORDER[i].
_W4A8_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """Return the codes, uint8 [rows, 8 cols], of words int32 [rows, cols], lowest bits first."""
    spread = words.contiguous().view(torch.uint8).to(torch.int16)
    spread |= spread << 4
    return (spread & 0x0F0F).view(torch.uint8)


def unpack_zero_points(words: torch.Tensor) -> torch.Tensor:
    """Return zero points, uint8 [groups, N], of words int32 [N/8, groups] packed along N."""
    return unpack_codes(words.t().contiguous())


def widen(
    words: torch.Tensor, zero_points: torch.Tensor | None, bits: int, k: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return codes and zero points of 2 or 3 bits as the same weight has them in 4 bits. Exact.

    Args:
        words: Codes, int32 [N, K*bits/32].
        zero_points: int32 [N*bits/32, K/g]; None: every zero point is 2^(bits-1), and becomes 8.
        bits: 2 or 3.
        k: Input channels.
    """
    shift = 8 - (1 << bits >> 1) if zero_points is None else 0
    wide = words.new_empty(len(words), k // 8)
    for start, stop in _row_chunks(len(words), k, 1):
        wide[start:stop] = pack(unpack(words[start:stop], bits=bits, size=k) + shift)
    if zero_points is None:
        return wide, None
    return wide, pack(unpack(zero_points, 0, bits, size=len(words)), packed_dim=0)


def _row_chunks(rows: int, k: int, multiple: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // (k * multiple)) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack_int4(
    words: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int4pack codes and `scale_zero` of a weight: see `cpu_int4_ops`."""
    n, k = words.shape[0], words.shape[1] * 8
    packed = torch.empty(n, k // 2, dtype=torch.uint8)
    for start, stop in _row_chunks(n, k, 64):  # int4pack interleaves up to 64 rows
        codes = unpack_codes(words[start:stop]).to(torch.int32)
        packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = scales.t().to(torch.bfloat16)
    zero = torch.zeros_like(scale)
    if zero_points is not None:
        offset = 8 - unpack_zero_points(zero_points).float()
        zero = (offset * scale.float()).to(torch.bfloat16)
    return packed, torch.stack([scale, zero], dim=-1).contiguous()


def pack_w4a8(
    words: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert a weight to the blocks of vLLM's AMX W4A8 kernel. N must be a multiple of 32.

    Returns:
        Weights uint8 [N/32, blocks, bytes], scales float32 and zero points int8, both
        [N/32, K/g, 32].
    """

    def awq(codes: torch.Tensor) -> torch.Tensor:  # uint8 [n, cols] -> int32 [cols, n/8]
        octets = codes.view(-1, 8, codes.shape[1])[:, _W4A8_ORDER]
        pairs = octets[:, 0::2] | (octets[:, 1::2] << 4)
        words = pairs.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
        return words.view(torch.int32).squeeze(-1)

    n, k = words.shape[0], words.shape[1] * 8
    if zero_points is None:
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:
        zeros = unpack_zero_points(zero_points).t().contiguous()
    done: tuple[torch.Tensor, ...] = ()
    for start, stop in _row_chunks(n, k, 32):
        blocks = ops.convert_weight_packed_scale_zp(
            awq(unpack_codes(words[start:stop])),
            awq(zeros[start:stop]),
            scales[start:stop].t().to(torch.bfloat16).contiguous(),
            ops.CPUQuantAlgo.AWQ,
        )
        # Blocks of 32 outputs are independent, so chunks are laid one after the other.
        done = done or tuple(b.new_empty(n // 32, *b.shape[1:]) for b in blocks)
        for whole, part in zip(done, blocks, strict=True):
            whole[start // 32 : stop // 32] = part
    weights, zero_blocks, scale_blocks = done
    return weights, scale_blocks, zero_blocks
