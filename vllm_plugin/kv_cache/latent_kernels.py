# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of decode attention over latents: see ``latent_triton`` for what they compute.

``latent_logits`` rebuilds keys and multiplies them with the queries, ``latent_values`` sums value
latents, ``latent_merge`` adds up these sums and what raw tokens give. Names that they share:

- T: tokens of a tile. At 4 bits two tokens 16 apart share a byte, so that a tile is the low or the
  high bits of T rows of bytes, and two tiles in turn have the tokens of T / 16 groups of 32.
- H: half a head, padded. Q: query heads, padded. C: numbers of a latent that are read at a time.

What changes from step to step is not specialized: a new value must not compile a kernel while
requests wait. Strides of the cache and ranks are fixed for a layer, and loads need to know what
divides them.
"""

import triton
import triton.language as tl

FRONT = 16  # numbers in front of a row of partial sums: the highest logit, the sum of weights
_FRONT = tl.constexpr(FRONT)
_CHANGING = ["splits", "table_r", "raw_r", "logits_n", "logits_h"]


@triton.jit
def _dot(a, b, sums):
    return tl.dot(a, b, sums, input_precision="ieee")  # float32 stays float32, not TF32


@triton.jit
def _tile(tile, T: tl.constexpr, BITS: tl.constexpr):
    """The first token of a tile, and how far its tokens [T] are behind that."""
    t = tl.arange(0, T)
    begin = tile * T
    if BITS == 4:
        t = t // 16 * 32 + t % 16
        begin = tile // 2 * (2 * T) + tile % 2 * 16
    return begin, t


@triton.jit
def _row(at, BITS: tl.constexpr):
    """The row of numbers, or of bytes, of token ``at`` of a block."""
    if BITS == 4:
        at = at // 32 * 16 + at % 16
    return at


@triton.jit
def _code(stored, tile):
    """4-bit codes minus 8, which any float type holds: low bits in even tiles, high in odd ones."""
    return ((stored.to(tl.int32) >> (tile % 2 * 4)) & 15).to(tl.float32) - 8.0


@triton.jit
def _decoder(decode, first, rk, head, decode_r, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """Rows ``first`` to ``first + C`` of a head's decoder, its halves [C, H] apart."""
    c, h = first + tl.arange(0, C), tl.arange(0, H)
    at = decode + c[:, None] * decode_r + head * D + h[None, :]
    real = (c < rk)[:, None] & (h < D // 2)[None, :]
    return tl.load(at, real, 0.0), tl.load(at + D // 2, real, 0.0)


@triton.jit
def _latent(
    latents, at_row, scales, at_scale, tile, first, rk, P,
    T: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Numbers ``first`` to ``first + C`` of the key latents of a tile, [T, C]."""
    c = first + tl.arange(0, C)
    real = (c < rk)[None, :]
    latent = tl.load(latents + at_row[:, None] + c[None, :], real, 0)
    if BITS == 4:
        at = scales + at_scale[:, None] + c[None, :]
        step = tl.load(at, real, 0.0).to(tl.float32)
        zero = tl.load(at + P // 32 * rk, real, 0.0).to(tl.float32)
        codes = tl.reshape(_code(latent, tile), (T // 16, 16, C))
        latent = tl.reshape(codes * step[:, None, :] + (zero + 8 * step)[:, None, :], (T, C))
    return latent.to(TYPE)


@triton.jit(do_not_specialize=_CHANGING)
def latent_logits(
    logits, query, tokens, row, latents, scales, table, lengths, starts, decode, mean, cos_sin,
    turns, scale, splits, rk, rv, P, logits_n, logits_h, query_n, query_h, latent_b, scale_b,
    table_r, decode_r, cos_p,
    GROUP: tl.constexpr, D: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
    RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (n, HEADS KV heads, split): every ``splits``-th tile.

    logits: float32 [N, Hq, tokens], in powers of two.
    turns: [T, D], cosines and sines of the distances of a tile's tokens to its first one.
    RESIDENT: the heads' decoders, PARTS of C numbers, stay on chip; else they are read per tile.
    """
    n = tl.program_id(0).to(tl.int64)
    first_head, split = tl.program_id(1) * HEADS, tl.program_id(2)
    request, at_query = tl.load(row + n).to(tl.int64), tl.load(tokens + n).to(tl.int64) * query_n
    length, start = tl.load(lengths + request), tl.load(starts + request)
    h, g = tl.arange(0, H), tl.arange(0, Q)
    in_half, in_group = h < D // 2, g < GROUP
    TYPE: tl.constexpr = decode.dtype.element_ty
    decoders = ()
    if RESIDENT:
        for other in tl.static_range(HEADS):
            for part in tl.static_range(PARTS):
                decoders += _decoder(decode, part * C, rk, first_head + other, decode_r, C, D, H)
    STEP: tl.constexpr = 2 * T if BITS == 4 else T
    tiles = tl.cdiv(length, STEP) * (STEP // T)
    for tile in tl.range(split, tiles, splits, num_stages=STAGES):
        begin, t = _tile(tile, T, BITS)
        i = begin + t
        real = i < length
        block = tl.load(table + request * table_r + i // P, real, 0).to(tl.int64)
        at_row = block * latent_b + _row(i % P, BITS) * rk
        at_scale = at_row
        if BITS == 4:
            group = begin + 32 * tl.arange(0, T // 16)
            block = tl.load(table + request * table_r + group // P, group < length, 0).to(tl.int64)
            at_scale = block * scale_b + P * (rk + rv) // 4 + group % P // 32 * rk
        # A token is turned by its distance to the tile's first one, and the query is turned back by
        # that one's position: so a tile needs one row of the large table.
        at_cos = cos_sin + (start + tl.minimum(begin, length - 1)) * cos_p + h
        cos0 = tl.load(at_cos, in_half, 0.0).to(tl.float32)[None, :]
        sin0 = tl.load(at_cos + D // 2, in_half, 0.0).to(tl.float32)[None, :]
        if RESIDENT:
            parts = ()
            for part in tl.static_range(PARTS):
                x = _latent(
                    latents, at_row, scales, at_scale, tile, part * C, rk, P, T, C, BITS, TYPE
                )
                parts += (x,)  # type: ignore[assignment]
        for other in tl.static_range(HEADS):
            head = first_head + other
            at_mean = mean + head * D + h
            k1 = tl.zeros([T, H], tl.float32) + tl.load(at_mean, in_half, 0.0)[None, :]
            k2 = tl.zeros([T, H], tl.float32) + tl.load(at_mean + D // 2, in_half, 0.0)[None, :]
            if RESIDENT:
                for part in tl.static_range(PARTS):
                    k1 = _dot(parts[part], decoders[2 * (other * PARTS + part)], k1)
                    k2 = _dot(parts[part], decoders[2 * (other * PARTS + part) + 1], k2)
            else:
                for first in range(0, rk, C):
                    x = _latent(
                        latents, at_row, scales, at_scale, tile, first, rk, P, T, C, BITS, TYPE
                    )
                    d1, d2 = _decoder(decode, first, rk, head, decode_r, C, D, H)
                    k1, k2 = _dot(x, d1, k1), _dot(x, d2, k2)
            # Read here, where products need no registers.
            at_turn = turns + tl.arange(0, T)[:, None] * D + h[None, :]
            cos = tl.load(at_turn, in_half[None, :], 0.0).to(tl.float32)
            sin = tl.load(at_turn + D // 2, in_half[None, :], 0.0).to(tl.float32)
            at_q = query + at_query + (head * GROUP + g)[:, None] * query_h + h[None, :]
            in_q = in_group[:, None] & in_half[None, :]
            q1 = tl.load(at_q, in_q, 0.0).to(tl.float32) * scale
            q2 = tl.load(at_q + D // 2, in_q, 0.0).to(tl.float32) * scale
            p1, p2 = q1 * cos0 + q2 * sin0, q2 * cos0 - q1 * sin0
            s = tl.zeros([T, Q], tl.float32)
            s = _dot((k1 * cos - k2 * sin).to(TYPE), tl.trans(p1.to(TYPE)), s)
            s = _dot((k2 * cos + k1 * sin).to(TYPE), tl.trans(p2.to(TYPE)), s)
            at_s = (head * GROUP + g)[None, :] * logits_h + i[:, None]
            tl.store(logits + n * logits_n + at_s, s, real[:, None] & in_group[None, :])


@triton.jit
def _softmax_step(s, top, total):
    """Online softmax of logits [Q, T]: the highest, weights, what earlier sums shrink by, total."""
    higher = tl.maximum(top, tl.max(s, 1))
    weights, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
    return higher, weights, shrink, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=_CHANGING)
def latent_values(
    sums_out, logits, row, latents, scales, table, lengths, splits, rk, rv, P, width,
    logits_n, logits_h, latent_b, scale_b, table_r,
    HQ: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    TYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (n, split, C numbers): a run of tiles, for all query heads at once.

    sums_out: float32 [N, splits, HQ, width], as ``latent_merge`` reads it.
    """
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request = tl.load(row + n).to(tl.int64)
    length = tl.load(lengths + request)
    g, c = tl.arange(0, Q), tl.program_id(2) * C + tl.arange(0, C)
    top, total = tl.full([Q], -1e30, tl.float32), tl.zeros([Q], tl.float32)
    sums, middles = tl.zeros([Q, C], tl.float32), tl.zeros([Q], tl.float32)
    STEP: tl.constexpr = 2 * T if BITS == 4 else T
    tiles = tl.cdiv(length, STEP) * (STEP // T)
    run = tl.cdiv(tiles, splits)
    for tile in tl.range(split * run, tl.minimum((split + 1) * run, tiles), num_stages=STAGES):
        begin, t = _tile(tile, T, BITS)
        i = begin + t
        real = i < length
        block = tl.load(table + request * table_r + i // P, real, 0).to(tl.int64)
        front = (P // 2 if BITS == 4 else P) * rk
        at_row = block * latent_b + front + _row(i % P, BITS) * rv
        stored = tl.load(
            latents + at_row[:, None] + c[None, :], real[:, None] & (c < rv)[None, :], 0
        )
        at_s = n * logits_n + g[:, None] * logits_h + i[None, :]
        s = tl.load(logits + at_s, (g < HQ)[:, None] & real[None, :], float("-inf"))
        top, weights, shrink, total = _softmax_step(s, top, total)
        sums *= shrink[:, None]
        if BITS == 4:
            # A latent is code * step + middle. Weights take the step, which costs less than latents
            # that do, and the middles are one sum for all numbers.
            at = scales + block * scale_b + P * (rk + rv) // 4 + P // 16 * rk + i % P
            step = tl.load(at, real, 0.0).to(tl.float32)
            middle = tl.load(at + P, real, 0.0).to(tl.float32) + 8 * step
            middles = middles * shrink + tl.sum(weights * middle[None, :], 1)
            weights *= step[None, :]
            sums = _dot(weights.to(TYPE), _code(stored, tile).to(TYPE), sums)
        else:
            sums = _dot(weights.to(TYPE), stored.to(TYPE), sums)
    at_head = sums_out + ((n * splits + split) * HQ + g) * width
    tl.store(at_head, top, g < HQ)
    tl.store(at_head + 1, total, g < HQ)
    in_row = (g < HQ)[:, None] & (c < rv)[None, :]
    tl.store(at_head[:, None] + _FRONT + c[None, :], sums + middles[:, None], in_row)


@triton.jit(do_not_specialize=_CHANGING)
def latent_merge(
    out, sums_in, query, tokens, row, raw_table, raw_lens, key_cache, value_cache, decode, mean,
    scale, splits, rv, width, heads, out_n, out_h, query_n, query_h, raw_r, key_b, key_t, key_h,
    value_b, value_t, value_h, decode_r,
    GROUP: tl.constexpr, D: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (n, KV head): raw tokens, then one softmax of these and all splits.

    sums_in: float32 [N, splits, Hq, width]. A row is the highest logit and the sum of weights, and
    from FRONT on the sum of value latents.
    """
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, token = tl.load(row + n).to(tl.int64), tl.load(tokens + n).to(tl.int64)
    length = tl.load(raw_lens + n)
    g, h, d, t = tl.arange(0, Q), tl.arange(0, H), tl.arange(0, 2 * H), tl.arange(0, T)
    in_group, in_half, in_d = g < GROUP, (h < D // 2)[None, :], (d < D)[None, :]
    of_head = head * GROUP + g
    TYPE: tl.constexpr = decode.dtype.element_ty
    at_q = query + token * query_n + of_head[:, None] * query_h + h[None, :]
    q1 = tl.load(at_q, in_group[:, None] & in_half, 0.0).to(TYPE)
    q2 = tl.load(at_q + D // 2, in_group[:, None] & in_half, 0.0).to(TYPE)
    top, total = tl.full([Q], -1e30, tl.float32), tl.zeros([Q], tl.float32)
    result = tl.zeros([Q, 2 * H], tl.float32)
    for start in range(0, length, T):
        real = start + t < length
        at = (start + t) % BLOCK
        block = tl.load(raw_table + request * raw_r + (start + t) // BLOCK, real, 0).to(tl.int64)
        at_key = key_cache + (block * key_b + at * key_t + head * key_h)[:, None] + h[None, :]
        k1 = tl.load(at_key, real[:, None] & in_half, 0.0).to(TYPE)
        k2 = tl.load(at_key + D // 2, real[:, None] & in_half, 0.0).to(TYPE)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        s = tl.where(real[None, :], _dot(q2, tl.trans(k2), s) * scale, float("-inf"))
        at_value = (block * value_b + at * value_t + head * value_h)[:, None] + d[None, :]
        values = tl.load(value_cache + at_value, real[:, None] & in_d, 0.0).to(TYPE)
        top, weights, shrink, total = _softmax_step(s, top, total)
        result = _dot(weights.to(TYPE), values, result * shrink[:, None])

    of_all = heads * GROUP * width
    at_row = sums_in + n * splits * of_all + of_head * width
    highest = top
    for split in range(0, splits):
        highest = tl.maximum(highest, tl.load(at_row + split * of_all, in_group, -1e30))
    shrink = tl.exp2(top - highest)
    of_latents = tl.zeros([Q], tl.float32)
    for split in range(0, splits):
        weight = tl.exp2(tl.load(at_row + split * of_all, in_group, -1e30) - highest)
        of_latents += weight * tl.load(at_row + split * of_all + 1, in_group, 0.0)
    total = total * shrink + of_latents
    total = tl.where(total > 0, total, 1.0)
    means = tl.load(mean + head * D + d, d < D, 0.0).to(tl.float32)
    result = (result * shrink[:, None] + of_latents[:, None] * means[None, :]) / total[:, None]
    for begin in range(0, rv, C):
        c = begin + tl.arange(0, C)
        in_row = in_group[:, None] & (c < rv)[None, :]
        sums = tl.zeros([Q, C], tl.float32)
        for split in tl.range(0, splits, loop_unroll_factor=4):  # so that loads overlap
            at = at_row + split * of_all
            weight = tl.exp2(tl.load(at, in_group, -1e30) - highest) / total
            sums += weight[:, None] * tl.load(at[:, None] + _FRONT + c[None, :], in_row, 0.0)
        at_decode = decode + c[:, None] * decode_r + head * D + d[None, :]
        rows = tl.load(at_decode, (c < rv)[:, None] & in_d, 0.0)
        result = _dot(sums.to(TYPE), rows, result)
    at_out = out + token * out_n + of_head[:, None] * out_h + d[None, :]
    tl.store(at_out, result.to(out.dtype.element_ty), in_group[:, None] & in_d)
