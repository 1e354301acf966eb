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
    query (R * Hq * T elements). None: what suits the device. Products are in the keys' own type,
    as in attention kernels, softmax and sums in float32.

    Limits: plain softmax attention. Logit soft caps, sinks and sliding windows are not modelled.
    """
    requests, query_heads, count, _ = queries.shape
    _, kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    real = positions >= 0
    # Padding queries become zero and see key 0 only, so that they are finite when weighted away.
    grouped = torch.where(real[:, None, :, None], queries * scale, 0).to(keys.dtype)
    grouped = grouped.unflatten(1, (kv_heads, group))
    transposed = keys.transpose(-1, -2)
    received = keys.new_zeros((requests, kv_heads, 1, tokens), dtype=torch.float32)
    if block is None:
        block = _CPU_BLOCK if keys.device.type == "cpu" else _BLOCK
    rows = max(1, block // max(1, requests * query_heads * tokens))
    for start in range(0, count, rows):
        at = positions[:, start : start + rows].clamp(min=0)
        # All queries see the keys before this one, so those need no mask. A GPU would have to wait.
        common = int(at.min()) if at.device.type == "cpu" else 0
        hidden = torch.arange(common, tokens, device=keys.device) > at[:, :, None]
        # Added, as filling with a broadcast mask is many times slower on a CPU.
        causal = torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, -torch.inf)
        # The heads of a group are stacked as rows, so that each KV head is one matrix product.
        logits = (grouped[:, :, :, start : start + rows].flatten(2, 3) @ transposed).float()
        logits.unflatten(2, (group, -1))[..., common:].add_(causal[:, None, None])
        # A softmax in place: on a CPU fresh memory costs more than the arithmetic. What each row is
        # divided by joins its weight, so that the sum over queries is a matrix product too.
        logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        weight = real[:, None, start : start + rows].repeat(1, 1, group) / logits.sum(-1)
        received += weight.unsqueeze(2) @ logits
    return received.squeeze(2) / group
