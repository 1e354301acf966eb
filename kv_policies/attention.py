# SPDX-License-Identifier: Apache-2.0
"""Attention received per key, without the attention matrix."""

import torch

from kv_policies.workspace import QUERIES, Heads, Transient

# Elements of one block of probabilities. On a CPU a block has to stay in a core's cache (2 MiB in
# float32: twice as fast as 64 MiB); elsewhere it has to be worth a kernel launch.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 22


def attention_transient(heads: Heads) -> Transient:
    """Memory that ``attention_received`` takes beside its arguments and its result."""
    each = 16  # bytes per probability: logits in two types, a mask in two, rounded up
    block = _CPU_BLOCK if heads.device == "cpu" else _BLOCK
    keys_in_float = 4 * heads.size if heads.itemsize in (2, 3) else 0  # 3: with a byte of FP8
    return Transient(
        per_token=keys_in_float + heads.group * each + 8,
        per_row=QUERIES * heads.group * (8 * heads.size + 8),
        fixed=each * block,
    )


def attention_received(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """Sum the causal attention that each key receives from some queries.

    The sum is over queries, and additive over cuts of them; over the query heads that share a KV
    head it is the mean. Products are in the keys' own type, as in attention kernels, except for
    float16: torch would round logits to it, and above 65,504 they would be infinite. Softmax and
    sums are in float32.

    Limits: Sliding windows are not modelled.

    Args:
        queries: [R, Hq, Q, D].
        positions: [R, Q], -1 for padding. Query i sees keys 0 .. positions[i].
        keys: [R, Hkv, T, D].
        scale: Factor on q.k in the softmax.
        sinks: One learned logit per query head, which takes its share of every softmax and gives
            nothing (gpt-oss), [Hq] or [R, Hq]; None: the model has none.
        softcap: Logits x are ``softcap * tanh(x / softcap)`` (Gemma 2); None: the model has no cap.
        block: Most probabilities that are computed at a time, in elements: blocks of queries, at
            least one query (R * Hq * T elements). None: what suits the device.

    Returns:
        float32 [R, Hkv, T].
    """
    requests, query_heads, count, _ = queries.shape
    _, kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    if keys.dtype == torch.float16:
        keys = keys.float()
    real = positions >= 0
    # Padding queries become zero and see key 0 only, so that they are finite when weighted away.
    grouped = torch.where(real[:, None, :, None], queries.to(keys.dtype) * scale, 0)
    grouped = grouped.unflatten(1, (kv_heads, group))
    transposed = keys.transpose(-1, -2)
    received = keys.new_zeros((requests, kv_heads, 1, tokens), dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.float().view(-1, kv_heads, group, 1)
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
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        logits.unflatten(2, (group, -1))[..., common:].add_(causal[:, None, None])
        # A softmax in place: on a CPU fresh memory costs more than the arithmetic. What each row is
        # divided by joins its weight, so that the sum over queries is a matrix product too.
        largest = logits.amax(-1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(-1)
        if sinks is not None:  # infinite where a sink leaves nothing to the keys
            ours = sinks.expand(-1, -1, -1, at.shape[1]).flatten(2)
            total += (ours - largest.squeeze(-1)).exp()
        weight = real[:, None, start : start + rows].repeat(1, 1, group) / total
        received += weight.unsqueeze(2) @ logits
    return received.squeeze(2) / group


def pooled(votes: torch.Tensor, size: int) -> torch.Tensor:
    """The most votes of a token and its neighbours.

    Args:
        votes: [R, H, T], not negative.
        size: Tokens that are looked at, the token in their middle.

    Returns:
        [R, H, T].
    """
    padded = torch.nn.functional.pad(votes, ((size - 1) // 2, size // 2))
    return torch.nn.functional.max_pool1d(padded, size, stride=1)
