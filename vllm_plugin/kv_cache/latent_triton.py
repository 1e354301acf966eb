# SPDX-License-Identifier: Apache-2.0
"""Decode attention over old tokens held as low-rank latents and recent tokens held as they are.

Per layer F = Hkv * D, and an old token at position p has latents ck [rk] and cv [rv]::

    K = RoPE_p(key_mean + ck @ key_decode)   rebuilt tile by tile on chip, never written
    V = value_mean + cv @ value_decode       never rebuilt: value_decode is applied once per head
                                             to sum_p prob_p * cv_p

RoPE is NeoX's: the halves of a head are (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

A latent block of a layer's cache holds P tokens with consecutive positions, from the block's first
byte, either

- bits 16, elements of the cache's dtype, P a multiple of 16: keys [P, rk], values [P, rv]; or
- bits 4, P a multiple of 32: key codes uint8 [P/2, rk], value codes uint8 [P/2, rv], then float16
  key scale [P/32, rk], key zero [P/32, rk], value scale [P], value zero [P]. Byte row g * 16 + i
  holds token g * 32 + i in its low nibble and g * 32 + 16 + i in its high one. A latent is
  code * scale + zero: per channel and 32 tokens for keys, per token for values.

Three launches, which share float32 logits [N, Hq, tokens] and sums of value latents in the device's
memory:

- ``latent_logits``: a program has one or two KV heads of a query token, and keeps their slices of
  key_decode on chip while key latents stream by. Tokens are the rows of every product, so that
  rebuilt keys are the operand of the next one from registers. A tile's keys are rotated by their
  distance to its first token, and the query is rotated back by that token's position.
- ``latent_values``: a program has all heads of a query token, so that a value latent is read once.
- ``latent_merge``: a program has one KV head, attends to raw tokens, joins all parts in one softmax
  and applies value_decode.

What it costs per old token, layer and query token, as arithmetic. No speed of it is measured yet:

- Bytes: (rk + rv) * itemsize, or (rk + rv) / 2 + rk / 8 + 4 at 4 bits, and 8 * Hq for logits; raw
  K and V are 2 * F * itemsize. With F = 1024, 32 heads, rk = rv = 208 and bfloat16 1088 or 494
  instead of 4096. The programs of other heads read the key latents again, from L2.
- FLOPs: 2 * rk * F to rebuild K and 3 * F to rotate it, 0.43 M in the example. Values cost
  2 * Hq * rv instead of 2 * Hq * D. So keys want low ranks, and values may have high ones.

Limits: all of D is rotated, by angles that grow with the position; no soft cap, sinks or sliding
window. Query tokens of one request each rebuild the keys. The raw tokens of a request are read by
one program per KV head: thousands of them, as with ``decode_window`` 0, take long at small batches.
Products are in the type of key_decode, sums in float32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_plugin.kv_cache.latent_kernels import FRONT, latent_logits, latent_merge, latent_values

_MOST_SPLITS = 64  # programs that share the values of a context: the merge reads them in turn


class Tiles(NamedTuple):
    """How the kernels cut their work.

    Attributes:
        keys: Numbers of a key latent that are multiplied at a time.
        heads: KV heads of a program for logits.
        resident: Their decoders stay on chip.
        tokens: Of a tile of keys.
        merged: Raw tokens, and numbers of a sum of latents, that are merged at a time.
    """

    keys: int
    heads: int
    resident: bool
    tokens: int
    merged: int


class Latents(NamedTuple):
    """The latents of a layer, and what maps them to keys and values.

    Attributes:
        blocks: uint8 [num_blocks, block_bytes].
        tokens: Of a block.
        bits: Of a number.
        key_decode: [rk, F].
        key_mean: [F].
        value_decode: [rv, F].
        value_mean: [F].
        cos_sin: [positions, D], cos then sin, D / 2 each, as vLLM's ``rotary_emb.cos_sin_cache``.
        turns: See ``turns``.
        tiles: See ``tiles_for``.
    """

    blocks: torch.Tensor
    tokens: int
    bits: int
    key_decode: torch.Tensor
    key_mean: torch.Tensor
    value_decode: torch.Tensor
    value_mean: torch.Tensor
    cos_sin: torch.Tensor
    turns: torch.Tensor
    tiles: Tiles


class Context(NamedTuple):
    """What N query tokens of R requests read, int32.

    Attributes:
        tokens: Row of each query token in the query and in the result, [N].
        row: Its request, [N].
        raw_lens: Raw tokens that it sees, [N].
        raw_table: Blocks of a request's raw tokens, in order, [R, C].
        table: Its latent blocks, in order, [R, L]. All but the last are full.
        lengths: Its latents, [R]. Every query token sees all of them.
        starts: The position of the first, [R].
    """

    tokens: torch.Tensor
    row: torch.Tensor
    raw_lens: torch.Tensor
    raw_table: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor


def latent_decode(
    query: torch.Tensor,
    context: Context,
    latents: Latents,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    splits: int | None = None,
) -> None:
    """Attention of N query tokens; 0 where one sees no token.

    Args:
        query: [tokens, Hq, D], rotated.
        context: The query tokens, and what they read.
        latents: Of the layer.
        key_cache: [num_blocks, block_size, Hkv, D], any strides but the last; rotated.
        value_cache: As ``key_cache``. Both can be the memory of ``latents.blocks``.
        scale: Factor on q.k in the softmax.
        out: As ``query``. Rows that no query token has stay as they are.
        splits: Programs that share a context. None: enough to fill the device, judged by shapes
            alone, so that rounding depends on the batch.
    """
    _, query_heads, size = query.shape
    block_size, heads = key_cache.shape[1:3]
    count, bits, tiles = len(context.row), latents.bits, latents.tiles
    rk, rv = len(latents.key_decode), len(latents.value_decode)
    group, half = query_heads // heads, _padded(size // 2)
    numbers, value_tokens = _value_tile(rv, query_heads, latents.value_decode.element_size())
    longest = context.table.shape[1] * latents.tokens
    of_logits = of_values = splits
    if splits is None:
        programs = count * heads // tiles.heads
        of_logits = _splits(programs, longest // tiles.tokens, query.device)
        programs = count * triton.cdiv(rv, numbers)
        most = longest // (4 * value_tokens)
        of_values = min(_MOST_SPLITS, _splits(programs, most, query.device))
    sixteen = latents.blocks if bits == 4 else latents.blocks.view(key_cache.dtype)
    scales = latents.blocks.view(torch.float16)
    width = FRONT + triton.cdiv(rv, 16) * 16  # rows begin where wide loads can
    logits, sums = (
        torch.empty(count, *shape, dtype=torch.float32, device=query.device)
        for shape in (
            (query_heads, triton.cdiv(longest, 128) * 128),
            (of_values, query_heads, width),
        )
    )
    parts = triton.cdiv(rk, tiles.keys) if tiles.resident else 1
    in_base_2 = scale * math.log2(math.e)
    latent_logits[count, heads // tiles.heads, of_logits](
        logits, query, context.tokens, context.row, sixteen, scales, context.table,
        context.lengths, context.starts, latents.key_decode, latents.key_mean, latents.cos_sin,
        latents.turns, in_base_2, of_logits, rk, rv, latents.tokens, *logits.stride()[:2],
        *query.stride()[:2], sixteen.stride(0), scales.stride(0), context.table.stride(0),
        latents.key_decode.stride(0), latents.cos_sin.stride(0),
        GROUP=group, D=size, H=half, Q=_padded(group), C=tiles.keys, PARTS=parts,
        BITS=bits, T=tiles.tokens, HEADS=tiles.heads, RESIDENT=tiles.resident, STAGES=2,
        num_warps=8,
    )  # fmt: skip
    latent_values[count, of_values, triton.cdiv(rv, numbers)](
        sums, logits, context.row, sixteen, scales, context.table, context.lengths, of_values,
        rk, rv, latents.tokens, width, *logits.stride()[:2], sixteen.stride(0), scales.stride(0),
        context.table.stride(0),
        HQ=query_heads, Q=_padded(query_heads), C=numbers, BITS=bits, T=value_tokens,
        TYPE=_TYPES[latents.value_decode.dtype], STAGES=2, num_warps=8,
    )  # fmt: skip
    latent_merge[count, heads](
        out, sums, query, context.tokens, context.row, context.raw_table, context.raw_lens,
        key_cache, value_cache, latents.value_decode, latents.value_mean, in_base_2, of_values, rv,
        width, heads, *out.stride()[:2], *query.stride()[:2], context.raw_table.stride(0),
        *key_cache.stride()[:3], *value_cache.stride()[:3], latents.value_decode.stride(0),
        GROUP=group, D=size, H=half, Q=_padded(group), C=tiles.merged, BLOCK=block_size,
        T=tiles.merged,
    )  # fmt: skip


# By bits: bytes of shared memory, and the highest ranks of keys that the resident decoders of one
# and of two heads of 128 can then have.
_RESIDENT = {
    16: ((227 << 10, 224, 128), (163 << 10, 128, 64)),
    4: ((227 << 10, 224, 64), (163 << 10, 128, 0)),
}
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def tiles_for(rk: int, bits: int, heads: int, size: int, itemsize: int, shared: int) -> Tiles:
    """Tiles of keys that fit into a processor; the tests compile them.

    Args:
        rk: Rank of keys. Any is served; those up to 224 keep their decoders on chip where there is
            room, and those up to 128 (64 at 4 bits) those of two heads.
        bits: Of a number.
        heads: KV heads.
        size: Channels of a head.
        itemsize: Bytes of a number of the decoders.
        shared: Bytes of shared memory that a program may have.
    """
    # The cut of least padding, and of these the largest.
    keys = min((128, 64, 32), key=lambda c: triton.cdiv(rk, c) * c) if rk > 32 else _padded(rk)
    if bits == 4:
        keys = min(keys, 64)
    whole = triton.cdiv(rk, keys) * keys
    one, two = next((most for least, *most in _RESIDENT[bits] if shared >= least), (0, 0))
    resident = itemsize == 2 and size <= 128 and whole <= one
    if not resident:
        keys = min(64, _padded(rk))
        while keys > 16 and keys * _padded(size // 2) * itemsize > 1 << 13:
            keys //= 2
    return Tiles(
        keys=keys,
        heads=2 if resident and whole <= two and heads % 2 == 0 else 1,
        resident=resident,
        tokens=128 if resident else 64,
        merged=max(16, min(64, (1 << 13) // (_padded(size // 2) * itemsize))),
    )


def _value_tile(rv: int, query_heads: int, itemsize: int) -> tuple[int, int]:
    """Numbers of a value latent that a program sums, and tokens of a tile."""
    numbers = min(_padded(rv), max(16, (1 << 14) // _padded(query_heads)))
    return numbers, max(16, min(64, (1 << 15) // (numbers * itemsize)))


def turns(table: torch.Tensor, tokens: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of ``cos_sin`` for the distances of a tile's tokens to its first one, [tokens, D].

    Args:
        table: cos_sin.
        tokens: Of a tile.
        bits: Of a number: at 4, a tile's tokens are every other 16.
        dtype: Of the cache. For 16 bits the table is rounded to float16, which is small enough for
            the first-level cache and finer than bfloat16 keys.
    """
    at = torch.arange(tokens, device=table.device)
    if bits == 4:
        at = at // 16 * 32 + at % 16
    rounded = torch.float16 if dtype.itemsize == 2 else torch.float32
    # Tokens behind the last position are never read.
    return table[at.clamp(max=len(table) - 1)].to(rounded).contiguous()


def _padded(size: int) -> int:
    """The tensor cores' least side is 16, and tiles are powers of two."""
    return max(16, triton.next_power_of_2(size))


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Enough to fill the device with two programs per processor, of one tile at least each."""
    return max(1, min(-(-resident(device) // max(1, programs)), tiles))


def resident(device: torch.device) -> int:
    """Programs that fill a device: two per processor."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have. A processor without a GPU is taken for an H100."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
