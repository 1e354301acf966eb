# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that turn raw tokens into latents, between two products of PyTorch's.

``read_centered`` reads keys and values, takes the rotation off keys and subtracts means. A product
projects them. ``encode`` writes latents as a block of a single unit would hold them, and ``place``
puts units into their blocks, once all that a step packs is read. Results are those of
``LatentCache.pack`` to the bit, where products are.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from kv_policies.latents.format import LatentFormat

_TOKENS = 32  # of a program that reads
_NUMBERS = 64  # of a latent that are encoded at a time
_PLACED = 1024  # numbers of 16 bits of a program that places
_LARGEST = tl.constexpr(torch.finfo(torch.float16).max)


# Block numbers and positions are parts of one tensor, which begin anywhere.
@triton.jit(
    do_not_specialize=["columns", "count"], do_not_specialize_on_alignment=["blocks", "first"]
)
def _read_centered(
    out, key_cache, value_cache, blocks, first, key_mean, value_mean, cos_sin, columns, count, last,
    key_b, key_t, key_h, value_b, value_t, value_h, cos_p, features,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (T tokens, KV head, side): float32 [2, tokens, F], keys without their rotation."""
    head, side = tl.program_id(1), tl.program_id(2)
    i, h = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, H)
    real = i < count * BLOCK
    block = tl.load(blocks + i // BLOCK, real, 0).to(tl.int64)
    keep = real[:, None] & (h < D // 2)[None, :]
    if side == 0:
        at = key_cache + (block * key_b + i % BLOCK * key_t + head * key_h)[:, None] + h[None, :]
    else:
        at = value_cache + (block * value_b + i % BLOCK * value_t + head * value_h)[:, None]
        at += h[None, :]
    x1 = tl.load(at, keep, 0.0).to(tl.float32)
    x2 = tl.load(at + D // 2, keep, 0.0).to(tl.float32)
    mean = value_mean
    if side == 0:
        piece = columns * BLOCK
        position = tl.load(first + i // piece, real, 0) + i % piece
        at_cos = cos_sin + (tl.minimum(position, last) * cos_p)[:, None] + h[None, :]
        cos, sin = tl.load(at_cos, keep, 0.0), tl.load(at_cos + D // 2, keep, 0.0)
        x1, x2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
        mean = key_mean
    at_mean = mean + head * D + h
    x1 -= tl.load(at_mean, h < D // 2, 0.0)[None, :]
    x2 -= tl.load(at_mean + D // 2, h < D // 2, 0.0)[None, :]
    at_out = (
        out + (side.to(tl.int64) * count * BLOCK + i)[:, None] * features + head * D + h[None, :]
    )
    tl.store(at_out, x1, keep)
    tl.store(at_out + D // 2, x2, keep)


@triton.jit
def _scaled(least, most):
    """float16 zero and scale of a range, and what codes are divided by."""
    zero = tl.maximum(tl.minimum(least, _LARGEST), -_LARGEST).to(tl.float16)
    scale = tl.minimum(tl.div_rn(most - least, 15.0), _LARGEST).to(tl.float16)
    step = scale.to(tl.float32)
    return zero, scale, tl.where(step > 0, step, 1.0)


@triton.jit
def _rounded(x, zero, step):
    """Codes 0 to 15, rounded half to even: at 2 ** 23 a float has no fraction."""
    code = tl.minimum(tl.maximum(tl.div_rn(x - zero.to(tl.float32), step), 0.0), 15.0)
    return (code + 8388608.0 - 8388608.0).to(tl.uint8)


@triton.jit
def _encode(
    staged, scales, keys, values, rk, rv, unit_b,
    BITS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Program (unit, side): the latents of a unit, float32 [unit, rank], as a block has them."""
    unit, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, c = tl.arange(0, 16), tl.arange(0, C)
    rank, latents, front = rk, keys, 0
    if side == 1:
        rank, latents, front = rv, values, 16 * rk
    at_out = staged + unit * unit_b + front + t[:, None] * rank + c[None, :]
    if BITS == 16:
        at = latents + (unit * 16 + t)[:, None] * rank + c[None, :]
        for begin in range(0, rank, C):
            real = (begin + c < rank)[None, :]
            x = tl.load(at + begin, real, 0.0)
            tl.store(at_out + begin, x.to(staged.dtype.element_ty), real)
    else:
        low = latents + (unit * 32 + t)[:, None] * rank + c[None, :]
        high = low + 16 * rank
        at_scale = scales + unit * (unit_b // 2) + 8 * (rk + rv)
        if side == 0:
            for begin in range(0, rank, C):
                real = begin + c < rank
                x, y = (
                    tl.load(low + begin, real[None, :], 0.0),
                    tl.load(high + begin, real[None, :], 0.0),
                )
                least = tl.minimum(tl.min(x, 0), tl.min(y, 0))
                zero, scale, step = _scaled(least, tl.maximum(tl.max(x, 0), tl.max(y, 0)))
                a, b = (
                    _rounded(x, zero[None, :], step[None, :]),
                    _rounded(y, zero[None, :], step[None, :]),
                )
                tl.store(at_out + begin, a | (b << 4), real[None, :])
                tl.store(at_scale + begin + c, scale, real)
                tl.store(at_scale + rk + begin + c, zero, real)
        else:
            inf = float("inf")
            x_least, x_most = tl.full([16], inf, tl.float32), tl.full([16], -inf, tl.float32)
            y_least, y_most = x_least, x_most
            for begin in range(0, rank, C):
                real = (begin + c < rank)[None, :]
                x_least = tl.minimum(x_least, tl.min(tl.load(low + begin, real, inf), 1))
                x_most = tl.maximum(x_most, tl.max(tl.load(low + begin, real, -inf), 1))
                y_least = tl.minimum(y_least, tl.min(tl.load(high + begin, real, inf), 1))
                y_most = tl.maximum(y_most, tl.max(tl.load(high + begin, real, -inf), 1))
            x_zero, x_scale, x_step = _scaled(x_least, x_most)
            y_zero, y_scale, y_step = _scaled(y_least, y_most)
            for begin in range(0, rank, C):
                real = (begin + c < rank)[None, :]
                x, y = tl.load(low + begin, real, 0.0), tl.load(high + begin, real, 0.0)
                a = _rounded(x, x_zero[:, None], x_step[:, None])
                b = _rounded(y, y_zero[:, None], y_step[:, None])
                tl.store(at_out + begin, a | (b << 4), real)
            at_token = at_scale + 2 * rk + t
            tl.store(at_token, x_scale)
            tl.store(at_token + 16, y_scale)
            tl.store(at_token + 32, x_zero)
            tl.store(at_token + 48, y_zero)


@triton.jit(do_not_specialize_on_alignment=["blocks", "units"])
def _place(cache, staged, blocks, units, base, stride, cache_b, size, E: tl.constexpr):
    """Program (unit, E numbers): a staged unit to its places in a block."""
    unit = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * E + tl.arange(0, E)
    real = e < size
    at = tl.load(base + e, real, 0) + tl.load(units + unit) * tl.load(stride + e, real, 0)
    content = tl.load(staged + unit * size + e, real, 0)
    tl.store(cache + tl.load(blocks + unit) * cache_b + at, content, real)


def read_centered(
    blocks: torch.Tensor,
    first: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor],
    means: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
) -> torch.Tensor:
    """Keys before RoPE and values of whole blocks, less their means.

    Args:
        blocks: Of P pieces, int64 [P, C].
        first: Position of the first token of each, int64 [P].
        sides: Keys and values of the cache, [blocks, block_size, Hkv, D].
        means: Of keys and of values, float32 [F].
        table: cos_sin, float32 [positions, D].

    Returns:
        float32 [2, tokens, F].
    """
    keys, values = sides
    block_size, heads, size = keys.shape[1:]
    count, features = blocks.numel(), heads * size
    out = torch.empty(2, count * block_size, features, device=keys.device)
    _read_centered[triton.cdiv(count * block_size, _TOKENS), heads, 2](
        out, keys, values, blocks, first, *means, table, blocks.shape[1], count, len(table) - 1,
        *keys.stride()[:3], *values.stride()[:3], table.stride(0), features,
        D=size, H=triton.next_power_of_2(size // 2), BLOCK=block_size, T=_TOKENS,
    )  # fmt: skip
    return out


def encode(keys: torch.Tensor, values: torch.Tensor, bits: int, staged: torch.Tensor) -> None:
    """Latents of M units as ``LatentFormat`` writes them.

    Args:
        keys: float32 [M * unit, key_rank].
        values: float32 [M * unit, value_rank].
        bits: 4 or 16.
        staged: [M, numbers of a unit] in the type of the cache.
    """
    scales = staged.view(torch.float16)
    staged = staged if bits == 16 else staged.view(torch.uint8)
    _encode[len(staged), 2](
        staged, scales, keys, values, keys.shape[1], values.shape[1], staged.stride(0),
        BITS=bits, C=_NUMBERS,
    )  # fmt: skip


def places(form: LatentFormat, dtype: torch.dtype) -> torch.Tensor:
    """Where ``encode`` puts the numbers of a unit, and a block has them.

    Returns:
        int32 [2, numbers of 16 bits in a unit]: the place in a block of a number of its first unit,
        and how much farther it is in each next unit.
    """
    ranks = form.key_rank, form.value_rank
    keys, values = (torch.zeros(1, form.unit, rank) for rank in ranks)
    sizes = [part.nbytes // 2 for part in form.encode(keys, values, dtype)]
    starts = [0, *accumulate(sizes)]
    units = form.tokens // form.unit
    first = [torch.arange(size) + start * units for size, start in zip(sizes, starts, strict=False)]
    farther = [torch.full((size,), size) for size in sizes]
    return torch.stack((torch.cat(first), torch.cat(farther))).int()


def place(
    cache: torch.Tensor,
    staged: torch.Tensor,
    blocks: torch.Tensor,
    units: torch.Tensor,
    where: torch.Tensor,
) -> None:
    """Put units of latents into their blocks.

    Args:
        cache: [blocks, elements].
        staged: See ``encode``.
        blocks: Block of each unit, int64 [M].
        units: Where it goes in the block, int64 [M].
        where: See ``places``.
    """
    cache, staged = cache.view(torch.int16), staged.view(torch.int16)
    size = staged.shape[1]
    _place[len(staged), triton.cdiv(size, _PLACED)](
        cache, staged, blocks, units, *where, cache.stride(0), size, E=_PLACED
    )
