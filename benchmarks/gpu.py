# SPDX-License-Identifier: Apache-2.0
"""What runs on a GPU and how fast, with random weights: no download, and no figure of quality.

    .venv/bin/python -m benchmarks.gpu [--part NAME ...] [--json] [--out FILE] [--lines FILE]

`tools/gpu_check.py` runs all parts, the most valuable first, each with a time limit.

stack     attention_error: FlashAttention over a paged cache against float64, relative.
identity  keep1_same_as_stock: share of requests with stock's tokens, also with Triton attention.
          recent_same_as_recent_eager: with decode windows, in graphs and without.
          snap_kv_same_as_stock is below 1, or nothing is compressed. P_freed_blocks,
          P_leaked_blocks: blocks given back by requests that go on, and blocks lost at the end.
syncs     P_syncs: places of ours in a step that wait for the device.
decode    P_decode_ratio_bB: new tokens per second of B requests over stock vLLM with full decode
          graphs; P_prefill_ratio: of one prompt of 8,192 tokens. Llama-3.1-8B's shape, bfloat16.
int4      the same with int4 weights under both.
kernel    one layer of Llama-3.1-8B's attention, for B requests of N tokens, cskv at ratio 0.8:
          kernel_ratio_bB_N, time of vLLM's Triton attention over raw keys and values over that of
          ours over latents; kernel_bandwidth_share_bB_N and kernel_flops_share_bB_N, what ours
          reads and computes per second over what a copy and a product of 8,192 x 8,192 do.
          flash_ratio_bB_N: Triton's time over FlashAttention's. With _int4 too.
latents   cskv_decode_ratio_bB, cskv_4bit_decode_ratio_bB over stock, cskv at ratio 0.8 and, in 4
          bits, 0.86, all with full graphs; cskv_pieces is cskv with piecewise graphs.
pool      snap_kv_requests_ratio, snap_kv_tokens_ratio: requests at once and tokens per second over
          stock in a pool for 8 full requests of 8,192 tokens, keep 0.25.
denoise   P_ratio_bB: tokens per second of B requests of 128 tokens, canvas of 128 (32 for B = 8),
          2 tokens a step, on LLaDA-8B's shape, over recomputing everything. elastic_probe is
          elastic that never refreshes, so what watching attention costs beside never. With random
          weights attention does not drift as a trained model's does: elastic is not measured.
          fixed_period_graphs_ratio_bB, never_graphs_ratio_bB: over the same with --enforce-eager.
calibration  calibration_s: seconds to calibrate a random model of Llama-3.1-8B's shape as
          `--quantization smoothquant_plus` does at load, text sampled too and nothing in the cache;
          calibration_hash_s: to hash its weights before.
defaults  keep1_default_decode_ratio_bB: both with torch.compile, as `vllm serve` starts them.

Limits. On a device with less than 120 GB the 8B shapes have 16 layers instead of 32.
"""

import sys
from typing import Any

import torch

from benchmarks.common import NotHere, Options, Part, Result, main
from benchmarks.cskv_kernel import kernel
from benchmarks.gpu_calibration import calibration
from benchmarks.gpu_engines import decode, defaults, denoise, identity, int4, latents, pool, syncs

_BLOCK, _HEADS, _KV_HEADS, _SIZE = 16, 32, 8, 128


def stack(options: Options, result: Result) -> None:
    """Fill attention_error, of one new token each after contexts of unequal length."""
    if not torch.cuda.is_available():
        raise NotHere("FlashAttention needs an NVIDIA GPU")
    import triton
    import vllm
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    result.note(
        "stack",
        {
            "device": torch.cuda.get_device_name(),
            "bytes": torch.cuda.get_device_properties(0).total_memory,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "vllm": vllm.__version__,
            "flash_attention": get_flash_attn_version(head_size=_SIZE),
        },
    )
    torch.manual_seed(options.seed)
    result.put("attention_error", _flash_error([7, 130, 1000, 2048]))


def _flash_error(lengths: list[int]) -> float:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    draw: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    columns, requests = -(-max(lengths) // _BLOCK), len(lengths)
    cache = torch.randn(2, requests * columns, _BLOCK, _KV_HEADS, _SIZE, **draw)
    keys, values = cache
    table = torch.randperm(requests * columns, device="cuda").int().view(requests, columns)
    query = torch.randn(requests, _HEADS, _SIZE, **draw)
    found = flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        cu_seqlens_q=torch.arange(requests + 1, device="cuda", dtype=torch.int32),
        max_seqlen_q=1,
        seqused_k=torch.tensor(lengths, device="cuda", dtype=torch.int32),
        max_seqlen_k=max(lengths),
        softmax_scale=_SIZE**-0.5,
        causal=True,
        block_table=table,
        fa_version=get_flash_attn_version(head_size=_SIZE),
    )
    error = norm = 0.0
    for row, length in enumerate(lengths):
        k, v = (
            side[table[row].long()].flatten(0, 1)[:length].double().repeat_interleave(4, 1)
            for side in (keys, values)
        )
        weights = (torch.einsum("hd,nhd->hn", query[row].double(), k) * _SIZE**-0.5).softmax(-1)
        want = torch.einsum("hn,nhd->hd", weights, v)
        error += float((found[row] - want).square().sum())
        norm += float(want.square().sum())
    return (error / norm) ** 0.5


PARTS = {
    "stack": Part(("attention_error",), stack),
    "identity": Part(("keep1_same_as_stock", "snap_kv_same_as_stock"), identity),
    "syncs": Part(("snap_kv_syncs",), syncs),
    "decode": Part(("keep1_decode_ratio_b1", "snap_kv_decode_ratio_b1"), decode),
    "int4": Part(("keep1_int4_decode_ratio_b1", "snap_kv_int4_decode_ratio_b1"), int4),
    "kernel": Part(("kernel_ratio_b8_2048", "kernel_ratio_b8_2048_int4"), kernel),
    "latents": Part(("cskv_decode_ratio_b8", "cskv_4bit_decode_ratio_b8"), latents),
    "pool": Part(("snap_kv_requests_ratio", "snap_kv_tokens_ratio"), pool),
    "denoise": Part(("fixed_period_ratio_b1", "never_ratio_b1"), denoise),
    "calibration": Part(("calibration_s",), calibration),
    "defaults": Part(("keep1_default_decode_ratio_b1",), defaults),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
