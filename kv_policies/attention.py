# SPDX-License-Identifier: Apache-2.0
"""Attention received per key, without the attention matrix."""

import torch

# Elements of one block of probabilities. On a CPU a block has to stay in a core's cache (2 MiB in
# float32: twice as fast as 64 MiB); elsewhere it has to be worth a kernel launch.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 24


def attention_received(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    block: int | None = None,
) -> torch.Tensor:
    """Causal attention each key receives, summed over queries: float32 [R, Hkv, T].

    Mean over the query heads that share a KV head. queries [R, Hq, Q, D], positions [R, Q] with -1
    for padding, keys [R, Hkv, T, D]; query i sees keys 0 .. positions[i]. Additive over queries.
    ``block`` bounds the probabilities held at a time, in elements: blocks of queries, at least one
    query (R * Hq * T elements). None: what suits the device.

    Limits: plain softmax attention. Logit soft caps, sinks and sliding windows are not modelled.
    """
    requests, query_heads, count, _ = queries.shape
    _, kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    columns = torch.arange(tokens, device=keys.device)
    real = positions >= 0
    # Padding may be uninitialised memory, and NaN * 0 is NaN. Keys that no query sees become zero;
    # padding queries become zero and see key 0 only, so that they are finite when weighted away.
    seen = columns <= positions.amax(1, keepdim=True)
    transposed = torch.where(seen[:, None, :, None], keys.float(), 0).transpose(-1, -2)
    grouped = torch.where(real[:, None, :, None], queries.float() * scale, 0)
    grouped = grouped.unflatten(1, (kv_heads, group))
    received = keys.new_zeros((requests, kv_heads, tokens), dtype=torch.float32)
    if block is None:
        block = _CPU_BLOCK if keys.device.type == "cpu" else _BLOCK
    rows = max(1, block // max(1, requests * query_heads * tokens))
    for start in range(0, count, rows):
        at = positions[:, start : start + rows]
        hidden = columns > at.clamp(min=0)[:, :, None]
        # Added, as filling with a broadcast mask is many times slower on a CPU.
        causal = torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, -torch.inf)
        # The heads of a group are stacked as rows, so that each KV head is one matrix product.
        logits = grouped[:, :, :, start : start + rows].flatten(2, 3) @ transposed
        logits.unflatten(2, (group, -1)).add_(causal[:, None, None])
        weight = real[:, start : start + rows].float().repeat(1, group)
        received += (weight[:, None, None] @ logits.softmax(-1)).squeeze(2)
    return received / group
