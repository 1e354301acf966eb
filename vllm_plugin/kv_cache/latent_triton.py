# SPDX-License-Identifier: Apache-2.0
"""Decode attention over old tokens held as low-rank latents and recent tokens held as they are.

Per layer F = Hkv * D, and an old token at position p has latents ck [rk] and cv [rv]::

    K = RoPE_p(key_mean + ck @ key_decode)   rebuilt tile by tile on chip, never written
    V = value_mean + cv @ value_decode       never rebuilt: value_decode is applied once per head
                                             to sum_p prob_p * cv_p

RoPE is NeoX's: the halves of a head are (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

A latent block of a layer's cache holds ``tokens`` = P tokens with consecutive positions, from the
block's first byte, either

- bits 16, elements of the cache's dtype, P a multiple of 16: keys [P, rk], values [P, rv]; or
- bits 4, P a multiple of 32: key codes uint8 [P/2, rk], value codes uint8 [P/2, rv], then float16
  key scale [P/32, rk], key zero [P/32, rk], value scale [P], value zero [P]. Byte row g * 16 + i
  holds token g * 32 + i in its low nibble and g * 32 + 16 + i in its high one. A latent is
  code * scale + zero: per channel and 32 tokens for keys, per token for values.

What it costs per old token, layer and query token, as arithmetic (`benchmarks.gpu` measures it: a
tenth of the arithmetic that an H200 can do, and slower than attention over raw tokens):

- Bytes: (rk + rv) * itemsize, or (rk + rv) / 2 + rk / 8 + 4 at 4 bits; raw K and V are
  2 * F * itemsize. With F = 1024, rk = rv = 208 and bfloat16 832 or 238 instead of 4096. The
  program of each KV head reads them, a row of cos_sin (D elements) and, per tile of 64 tokens, its
  slice of key_decode (rk * D * itemsize / 64 = 832 bytes): all but the first should hit in L2.
- FLOPs: 2 * rk * F to rebuild K and 3 * F to rotate it, 0.43 M in the example. Values cost
  2 * Hq * rv instead of 2 * Hq * D.
- So with rk = rv at 16 bits F / 2 FLOPs per byte of latents: with F = 1024 more than an H100 can
  do while it reads them (about 300). The gain is memory; time is bound by arithmetic.

The context is cut into tiles, dealt out to ``splits`` programs that each write a partial softmax;
a second kernel merges them.

Limits: all of D is rotated; no soft cap, sinks or sliding window. Query tokens of one request each
rebuild the keys. Products are in the type of key_decode, sums in float32. A tile's value latents
and their sum stay on chip, which suits rv up to about 1024. Tested in Triton's interpreter and
compiled for CUDA; its tests passed on an H200 (Triton 3.6).
"""

import math

import torch
import triton
import triton.language as tl

_GROUP = 32  # tokens that share a 4-bit key scale
_CHUNK = 64  # ranks decoded at a time: with 256 of them ptxas spills registers at D = 128
_VALUES = 1 << 15  # most bytes of a tile's value latents


def latent_decode(
    query: torch.Tensor,
    row: torch.Tensor,
    raw_table: torch.Tensor,
    raw_lens: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_bytes: torch.Tensor,
    latent_table: torch.Tensor,
    latent_counts: torch.Tensor,
    latent_first: torch.Tensor,
    key_decode: torch.Tensor,
    key_mean: torch.Tensor,
    value_decode: torch.Tensor,
    value_mean: torch.Tensor,
    cos_sin: torch.Tensor,
    scale: float,
    *,
    tokens: int,
    bits: int,
    out: torch.Tensor,
    splits: int | None = None,
) -> None:
    """Attention of N query tokens of R requests, to ``out`` [N, Hq, D]; 0 where one sees no token.

    query [N, Hq, D]: rotated. row, raw_lens: int32 [N], its request and the raw tokens it sees.
    raw_table: int32 [R, C], physical blocks of a request's raw tokens, in order.
    key_cache, value_cache: [num_blocks, block_size, Hkv, D], any strides but the last; K rotated.
    cache_bytes: uint8 [num_blocks, block_bytes], the same memory or any other.
    latent_table, latent_counts, latent_first: int32 [R, L], a request's latent blocks, the tokens
        in each (0: padding), the position of its first token. Every query token sees all of them.
    key_decode [rk, F], key_mean [F], value_decode [rv, F], value_mean [F]: the reconstruction.
    cos_sin: [positions, D], cos then sin, D / 2 each, as vLLM's ``rotary_emb.cos_sin_cache``.
    tokens, bits: the latent blocks' layout, see the module's text.
    splits: programs that share a context. None: enough to fill the device, judged by shapes alone,
        so that rounding depends on the batch.
    """
    count, query_heads, size = query.shape
    block_size, heads = key_cache.shape[1:3]
    (rk, rv), itemsize = (len(key_decode), len(value_decode)), key_decode.element_size()
    used = _block_bytes(tokens, rk, rv, bits, key_cache.element_size())
    if used > cache_bytes.shape[1]:
        raise ValueError(
            f"{tokens} tokens of {rk} + {rv} latents at {bits} bits need {used} bytes, "
            f"a block has {cache_bytes.shape[1]}"
        )
    group = query_heads // heads
    half, wide_v = _padded(size // 2), _padded(rv)
    tile = max(_GROUP if bits == 4 else 16, min(64, _VALUES // (wide_v * itemsize)))
    if splits is None:
        longest = latent_table.shape[1] * tokens + raw_table.shape[1] * block_size
        splits = _splits(count * heads, longest // tile, query.device)
    latents = cache_bytes if bits == 4 else cache_bytes.view(key_cache.dtype)
    scales = cache_bytes.view(torch.float16)
    width = triton.cdiv(size + rv + 3, 4) * 4  # so that rows are aligned
    partial = torch.empty(
        (count, heads, splits, group, width), dtype=torch.float32, device=query.device
    )
    shape = {"GROUP": group, "D": size, "RV": rv, "WIDTH": width, "M": _padded(group), "H": half}
    _attend[count, heads, splits](
        partial, query, row, raw_table, raw_lens, key_cache, value_cache, latents, scales,
        latent_table, latent_counts, latent_first, key_decode, key_mean, cos_sin,
        scale * math.log2(math.e), splits, latent_table.shape[1],
        *query.stride()[:2], raw_table.stride(0), *key_cache.stride()[:3],
        *value_cache.stride()[:3], latents.stride(0), scales.stride(0), latent_table.stride(0),
        latent_counts.stride(0), latent_first.stride(0), key_decode.stride(0), cos_sin.stride(0),
        **shape, RK=rk, P=tokens, BITS=bits, BLOCK=block_size, RVP=wide_v,
        CHUNK=min(_CHUNK, _padded(rk)), T=tile, num_warps=8 if half >= 64 else 4, num_stages=2,
    )  # fmt: skip
    _merge[count, heads](
        out, partial, value_decode, value_mean, splits, *out.stride()[:2], value_decode.stride(0),
        **shape, CHUNK=min(_CHUNK, wide_v),
    )  # fmt: skip


def _block_bytes(tokens: int, rk: int, rv: int, bits: int, itemsize: int) -> int:
    """Bytes of a latent block that are in use."""
    if bits not in (4, 16) or tokens % (_GROUP if bits == 4 else 16):
        raise ValueError(f"bits 4 and multiples of 32 tokens, or 16 and 16; got {bits}, {tokens}")
    if bits == 16:
        return tokens * (rk + rv) * itemsize
    return tokens * (rk + rv) // 2 + 4 * (tokens // _GROUP * rk + tokens)


def _padded(size: int) -> int:
    """The tensor cores' least side is 16, and tiles are powers of two."""
    return max(16, triton.next_power_of_2(size))


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Enough to fill the device, of at least four tiles each, from what the host knows."""
    return max(1, min(resident(device) // max(1, programs), tiles // 4))


def resident(device: torch.device) -> int:
    """Programs that fill a device: two per processor."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _dot(a, b, sums):
    return tl.dot(a, b, sums, input_precision="ieee")  # float32 stays float32, not TF32


@triton.jit
def _softmax_step(q1, q2, k1, k2, values, seen, scale, top, total, sums):
    """One tile of online softmax, in powers of two: ``top``, ``total`` and ``sums`` updated.

    q1, q2 [M, H] and k1, k2 [T, H]: the halves of heads; values [T, W]; seen [T].
    """
    logits = tl.dot(q1, tl.trans(k1.to(q1.dtype)), input_precision="ieee")
    logits = _dot(q2, tl.trans(k2.to(q2.dtype)), logits) * scale
    logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(top - higher)
    sums = _dot(weights.to(values.dtype), values, sums * shrink[:, None])
    return higher, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def _codes(latents, first, at, c, seen, RANK: tl.constexpr):
    """4-bit codes [T, C] of tokens ``at`` of their blocks, whose codes begin at ``first`` [T]."""
    byte = first + (at // 32 * 16 + at % 16) * RANK
    pairs = tl.load(latents + byte[:, None] + c[None, :], seen[:, None] & (c < RANK)[None, :], 0)
    return ((pairs.to(tl.int32) >> (at % 32 // 16 * 4)[:, None]) & 15).to(tl.float32)


@triton.jit
def _attend(
    partial, query, row, raw_table, raw_lens, key_cache, value_cache, latents, scales,
    latent_table, latent_counts, latent_first, key_decode, key_mean, cos_sin, scale, splits, slots,
    query_n, query_h, raw_r, key_b, key_t, key_h, value_b, value_t, value_h, latent_b, scale_b,
    table_r, counts_r, first_r, decode_r, cos_p,
    GROUP: tl.constexpr, D: tl.constexpr, RV: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, RK: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    RVP: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (n, KV head, split): every ``splits``-th tile of T tokens, first latents, then raw.

    partial: float32 [N, Hkv, splits, GROUP, WIDTH], a row being the raw sum of values [D], the sum
    of value latents [RV], the highest logit, the sum of weights, and that of the latents' weights.
    """
    n, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    request = tl.load(row + n).to(tl.int64)
    g, t, h = tl.arange(0, M), tl.arange(0, T), tl.arange(0, H)
    d, r = tl.arange(0, 2 * H), tl.arange(0, RVP)
    in_half = (h < D // 2)[None, :]
    TYPE: tl.constexpr = key_decode.dtype.element_ty
    at_q = query + n * query_n + (head * GROUP + g)[:, None] * query_h + h[None, :]
    in_q = (g < GROUP)[:, None] & in_half
    q1 = tl.load(at_q, in_q, 0.0).to(TYPE)
    q2 = tl.load(at_q + D // 2, in_q, 0.0).to(TYPE)
    # Finite, so that exp2(top - higher) is a number before the first token is seen.
    top, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)

    used = 0
    for start in range(0, slots, 128):
        slot = start + tl.arange(0, 128)
        held = tl.load(latent_counts + request * counts_r + slot, slot < slots, 0)
        used = tl.maximum(used, tl.max(tl.where(held > 0, slot + 1, 0)))
    at_mean = key_mean + head * D + h
    mean1 = tl.load(at_mean, h < D // 2, 0.0).to(tl.float32)
    mean2 = tl.load(at_mean + D // 2, h < D // 2, 0.0).to(tl.float32)
    sums = tl.zeros([M, RVP], tl.float32)
    for start in range(split * T, used * P, splits * T):
        slot, at = (start + t) // P, (start + t) % P
        real = slot < used
        seen = at < tl.load(latent_counts + request * counts_r + slot, real, 0)
        block = tl.load(latent_table + request * table_r + slot, real, 0).to(tl.int64)
        base = block * latent_b
        k1 = tl.zeros([T, H], tl.float32) + mean1[None, :]
        k2 = tl.zeros([T, H], tl.float32) + mean2[None, :]
        for begin in range(0, RK, CHUNK):
            c = begin + tl.arange(0, CHUNK)
            in_rank = (c < RK)[None, :]
            if BITS == 4:
                # The tokens of a group agree where its scales are. Tiles are whole groups.
                scale_at = block * scale_b + P * (RK + RV) // 4 + at // 32 * RK
                scale_at = tl.max(tl.reshape(scale_at, (T // 32, 32)), 1)
                at_scale = scales + scale_at[:, None] + c[None, :]
                step = tl.load(at_scale, in_rank, 0.0).to(tl.float32)
                zero = tl.load(at_scale + P // 32 * RK, in_rank, 0.0).to(tl.float32)
                codes = tl.reshape(_codes(latents, base, at, c, seen, RK), (T // 32, 32, CHUNK))
                latent = tl.reshape(codes * step[:, None, :] + zero[:, None, :], (T, CHUNK))
            else:
                at_latent = latents + (base + at * RK)[:, None] + c[None, :]
                latent = tl.load(at_latent, seen[:, None] & in_rank, 0.0)
            at_decode = key_decode + c[:, None] * decode_r + head * D + h[None, :]
            in_decode = (c < RK)[:, None] & in_half
            k1 = _dot(latent.to(TYPE), tl.load(at_decode, in_decode, 0.0), k1)
            k2 = _dot(latent.to(TYPE), tl.load(at_decode + D // 2, in_decode, 0.0), k2)
        position = tl.load(latent_first + request * first_r + slot, real, 0) + at
        at_cos = cos_sin + position[:, None] * cos_p + h[None, :]
        cos = tl.load(at_cos, seen[:, None] & in_half, 0.0).to(tl.float32)
        sin = tl.load(at_cos + D // 2, seen[:, None] & in_half, 0.0).to(tl.float32)
        if BITS == 4:
            at_scale = scales + block * scale_b + P * (RK + RV) // 4 + 2 * (P // 32) * RK + at
            step = tl.load(at_scale, seen, 0.0).to(tl.float32)
            zero = tl.load(at_scale + P, seen, 0.0).to(tl.float32)
            values = _codes(latents, base + P // 2 * RK, at, r, seen, RV)
            values = values * step[:, None] + zero[:, None]
        else:
            at_values = latents + (base + P * RK + at * RV)[:, None] + r[None, :]
            values = tl.load(at_values, seen[:, None] & (r < RV)[None, :], 0.0)
        top, total, sums = _softmax_step(
            q1, q2, k1 * cos - k2 * sin, k2 * cos + k1 * sin, values.to(TYPE), seen, scale,
            top, total, sums,
        )  # fmt: skip

    latent_top, latent_total = top, total
    raw = tl.zeros([M, 2 * H], tl.float32)
    length = tl.load(raw_lens + n)
    for start in range(split * T, length, splits * T):
        seen = start + t < length
        at = (start + t) % BLOCK
        block = tl.load(raw_table + request * raw_r + (start + t) // BLOCK, seen, 0).to(tl.int64)
        at_key = key_cache + (block * key_b + at * key_t + head * key_h)[:, None] + h[None, :]
        k1 = tl.load(at_key, seen[:, None] & in_half, 0.0)
        k2 = tl.load(at_key + D // 2, seen[:, None] & in_half, 0.0)
        at_value = (block * value_b + at * value_t + head * value_h)[:, None] + d[None, :]
        values = tl.load(value_cache + at_value, seen[:, None] & (d < D)[None, :], 0.0)
        top, total, raw = _softmax_step(
            q1, q2, k1, k2, values.to(TYPE), seen, scale, top, total, raw
        )
    shrink = tl.exp2(latent_top - top)

    at_row = ((n * tl.num_programs(1) + head) * splits + split) * GROUP + g
    at_row, in_row = partial + at_row * WIDTH, g < GROUP
    tl.store(at_row[:, None] + d[None, :], raw, in_row[:, None] & (d < D)[None, :])
    in_sums = in_row[:, None] & (r < RV)[None, :]
    tl.store(at_row[:, None] + D + r[None, :], sums * shrink[:, None], in_sums)
    tl.store(at_row + D + RV, top, in_row)
    tl.store(at_row + D + RV + 1, total, in_row)
    tl.store(at_row + D + RV + 2, latent_total * shrink, in_row)


@triton.jit
def _merge(
    out, partial, value_decode, value_mean, splits, out_n, out_h, decode_r,
    GROUP: tl.constexpr, D: tl.constexpr, RV: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (n, KV head): adds up the splits and decodes the sum of value latents."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, M), tl.arange(0, 2 * H)
    in_row, in_d = g < GROUP, (d < D)[None, :]
    TYPE: tl.constexpr = value_decode.dtype.element_ty
    at_row = partial + ((n * tl.num_programs(1) + head) * splits * GROUP + g) * WIDTH
    at_top = at_row + D + RV
    step = GROUP * WIDTH

    top = tl.full([M], -1e30, tl.float32)
    for split in range(0, splits):
        top = tl.maximum(top, tl.load(at_top + split * step, in_row, -1e30))
    total, latent_total = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    result = tl.zeros([M, 2 * H], tl.float32)
    for split in range(0, splits):
        weight = tl.exp2(tl.load(at_top + split * step, in_row, -1e30) - top)
        total += weight * tl.load(at_top + split * step + 1, in_row, 0.0)
        latent_total += weight * tl.load(at_top + split * step + 2, in_row, 0.0)
        raw = tl.load((at_row + split * step)[:, None] + d[None, :], in_row[:, None] & in_d, 0.0)
        result += weight[:, None] * raw
    total = tl.where(total > 0, total, 1.0)
    mean = tl.load(value_mean + head * D + d, d < D, 0.0).to(tl.float32)
    result = (result + latent_total[:, None] * mean[None, :]) / total[:, None]
    for begin in range(0, RV, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        in_sums = in_row[:, None] & (c < RV)[None, :]
        sums = tl.zeros([M, CHUNK], tl.float32)
        for split in range(0, splits):
            weight = tl.exp2(tl.load(at_top + split * step, in_row, -1e30) - top) / total
            at_sums = (at_row + split * step + D)[:, None] + c[None, :]
            sums += weight[:, None] * tl.load(at_sums, in_sums, 0.0)
        at_decode = value_decode + c[:, None] * decode_r + head * D + d[None, :]
        decode = tl.load(at_decode, (c < RV)[:, None] & in_d, 0.0)
        result = _dot(sums.to(TYPE), decode, result)
    at_out = out + n * out_n + (head * GROUP + g)[:, None] * out_h + d[None, :]
    tl.store(at_out, result.to(out.dtype.element_ty), in_row[:, None] & in_d)
