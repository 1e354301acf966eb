# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of cskv beside vLLM's attention over raw keys and values. Needs a GPU.

One layer of Llama-3.1-8B's shape at ratio 0.8: 32 heads of 128 over 8 KV heads, latents of 208 and
200 numbers, blocks of 64 tokens, the last 64 tokens raw, one query token a request.
"""

import math
from typing import Any

import torch

from benchmarks.common import NotHere, Options, Result

HEADS, KV_HEADS, WIDTH, RANKS = 32, 8, 128, (208, 200)
BLOCK, RECENT = 64, 64
SHAPES = ((8, 2048), (8, 8192), (64, 2048), (64, 8192))  # requests, tokens of each


def kernel(options: Options, result: Result) -> None:
    """Fill kernel_*: see the text of ``benchmarks.gpu``."""
    if not torch.cuda.is_available():
        raise NotHere("needs an NVIDIA GPU")
    torch.manual_seed(options.seed)

    rate, flops = _ceilings()
    result.details["device"] = torch.cuda.get_device_name()
    for requests, tokens in SHAPES[:1] if options.smoke else SHAPES:
        raw = _milliseconds(_raw(requests, tokens))
        flash = _milliseconds(_flash(requests, tokens))
        result.put(f"flash_ratio_b{requests}_{tokens}", raw / flash, raw_ms=raw, flash_ms=flash)
        for bits in (16, 4):
            run, used = _latents(requests, tokens, bits)
            spent = _milliseconds(run)
            name = f"b{requests}_{tokens}" + ("_int4" if bits == 4 else "")
            result.put(f"kernel_ratio_{name}", raw / spent, raw_ms=raw, latent_ms=spent)
            result.put(f"kernel_bandwidth_share_{name}", used / spent / rate)
            work = requests * tokens * 2 * (RANKS[0] * KV_HEADS * WIDTH + HEADS * RANKS[1])
            result.put(f"kernel_flops_share_{name}", work / spent / flops)


def _ceilings() -> tuple[float, float]:
    """Bytes and operations that the device does per millisecond."""
    memory, square = _random(1 << 14, 1 << 14), _random(8192, 8192)
    copied = torch.empty_like(memory)
    return (
        2 * memory.nbytes / _milliseconds(lambda: copied.copy_(memory)),
        2 * 8192**3 / _milliseconds(lambda: square @ square),
    )


def _milliseconds(run: Any) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=100, return_mode="median")


def _raw(requests: int, tokens: int) -> Any:
    """vLLM's Triton attention, called as its backend calls it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    columns = tokens // BLOCK
    cache = _random(requests * columns, BLOCK, KV_HEADS, 2 * WIDTH)
    keys, values = cache.chunk(2, dim=-1)
    table = torch.randperm(len(cache), device="cuda").int().view(requests, columns)
    query = _random(requests, HEADS, WIDTH)
    out = torch.empty_like(query)
    segments = 16
    sums = query.new_empty(requests, HEADS, segments, WIDTH, dtype=torch.float32)
    tops, totals = query.new_empty(2, requests, HEADS, segments, dtype=torch.float32)
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((requests,), tokens, device="cuda", dtype=torch.int32)
    return lambda: unified_attention(
        q=query,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=tokens,
        softmax_scale=WIDTH**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=128 // KV_HEADS,
        num_par_softmax_segments=segments,
        softmax_segm_output=sums,
        softmax_segm_max=tops,
        softmax_segm_expsum=totals,
    )


def _flash(requests: int, tokens: int) -> Any:
    """vLLM's FlashAttention, called as its backend calls it."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    columns = tokens // BLOCK
    cache = _random(2, requests * columns, BLOCK, KV_HEADS, WIDTH)
    table = torch.randperm(cache.shape[1], device="cuda").int().view(requests, columns)
    query = _random(requests, HEADS, WIDTH)
    out = torch.empty_like(query)
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((requests,), tokens, device="cuda", dtype=torch.int32)
    schedule = get_scheduler_metadata(
        batch_size=requests,
        max_seqlen_q=1,
        max_seqlen_k=tokens,
        num_heads_q=HEADS,
        num_heads_kv=KV_HEADS,
        headdim=WIDTH,
        cache_seqlens=lengths,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=BLOCK,
        causal=True,
        window_size=(-1, -1),
        num_splits=0,
    )
    return lambda: flash_attn_varlen_func(
        q=query,
        k=cache[0],
        v=cache[1],
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=tokens,
        softmax_scale=WIDTH**-0.5,
        causal=True,
        block_table=table,
        scheduler_metadata=schedule,
        fa_version=get_flash_attn_version(head_size=WIDTH),
    )


def _latents(requests: int, tokens: int, bits: int) -> tuple[Any, int]:
    """Our kernel, and the bytes of latents and raw tokens that it has to read."""
    from kv_policies.latents.format import LatentFormat
    from vllm_plugin.kv_cache.latent_triton import (
        Context,
        Latents,
        latent_decode,
        shared_bytes,
        tiles_for,
        turns,
    )

    features, elements = KV_HEADS * WIDTH, 2 * KV_HEADS * WIDTH * BLOCK
    form = LatentFormat(*RANKS, bits, LatentFormat.most_tokens(elements, *RANKS, bits))
    columns = math.ceil((tokens - RECENT) / form.tokens)
    cache = _random(requests * (columns + 1), BLOCK, KV_HEADS, 2 * WIDTH)
    keys, values = cache.chunk(2, dim=-1)
    blocks = cache.view(len(cache), -1)
    table = torch.randperm(len(cache), device="cuda").int().view(requests, columns + 1)
    units = form.tokens // form.unit
    form.write(
        blocks,
        table[:, 1:].flatten().long().repeat_interleave(units),
        torch.arange(units, device="cuda").repeat(requests * columns),
        form.encode(
            *(_random(requests * columns * units, form.unit, rank) for rank in RANKS),
            blocks.dtype,
        ),
    )
    angles = torch.randn(tokens, WIDTH // 2, device="cuda")
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    tiles = tiles_for(RANKS[0], bits, KV_HEADS, WIDTH, 2, shared_bytes(cache.device))
    latents = Latents(
        blocks.view(torch.uint8),
        form.tokens,
        bits,
        _random(RANKS[0], features) / RANKS[0] ** 0.5,
        _random(features),
        _random(RANKS[1], features) / RANKS[1] ** 0.5,
        _random(features),
        cos_sin,
        turns(cos_sin, tiles.tokens, bits, torch.bfloat16),
        tiles,
    )
    each = torch.arange(requests, device="cuda", dtype=torch.int32)
    context = Context(
        tokens=each,
        row=each,
        raw_lens=torch.full_like(each, RECENT),
        raw_table=table[:, :1].contiguous(),
        table=table[:, 1:].contiguous(),
        lengths=torch.full_like(each, tokens - RECENT),
        starts=torch.zeros_like(each),
    )
    query = _random(requests, HEADS, WIDTH)
    used = requests * (columns * form.bytes(2) + 4 * features * RECENT)
    out = torch.empty_like(query)
    return lambda: latent_decode(query, context, latents, keys, values, WIDTH**-0.5, out), used


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()
