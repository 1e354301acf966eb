# SPDX-License-Identifier: Apache-2.0
"""Attention over latents of old tokens and raw keys and values of recent ones."""

from typing import NamedTuple, Protocol

import torch


class Rotation(Protocol):
    """See ``rope.Rope``."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...


class Decoder(NamedTuple):
    """From latents back to keys or values: mean + latent @ decode, F = Hkv * D features.

    decode: [Hkv, rank, D]. mean: [Hkv, 1, D].
    """

    decode: torch.Tensor
    mean: torch.Tensor


class Latents(NamedTuple):
    """Of R requests, padded to N tokens: keys [R, N, key_rank], values [R, N, value_rank],
    positions int64 [R, N], and hidden, float [R, N], which is added to the logits."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor


class Raw(NamedTuple):
    """Raw keys and values [R, Hkv, T, D], and how many of them each query sees, int64 [R, Q]."""

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor


def attend(
    query: torch.Tensor,
    latents: Latents,
    raw: Raw,
    keys: Decoder,
    values: Decoder,
    rope: Rotation,
    scale: float,
) -> torch.Tensor:
    """One softmax over both, [R, Hq, Q, D] to the same.

    Keys are rebuilt and rotated to their positions. Values are not rebuilt: the weighted sum is
    taken of their latents and mapped once, since sum(p * (mean + c @ decode)) = sum(p) * mean +
    sum(p * c) @ decode. Latents are all older than the queries.

    Products are in the cache's own type, the softmax in float32.
    """
    requests, heads, count, width = query.shape
    kv_heads, rank, _ = keys.decode.shape
    tokens = latents.keys.shape[1]
    # Queries of the heads of a group are rows of one product per KV head.
    rows = query.reshape(requests, kv_heads, -1, width) * scale
    flat = latents.keys.reshape(1, -1, rank).expand(kv_heads, -1, -1)
    rebuilt = torch.baddbmm(keys.mean, flat, keys.decode)
    positions = latents.positions.flatten().repeat(kv_heads)
    rebuilt = rope.rotate(rebuilt.view(-1, 1, width), positions)
    rebuilt = rebuilt.view(kv_heads, requests, tokens, width)
    old = rows.transpose(0, 1) @ rebuilt.transpose(-1, -2)
    new = rows @ raw.keys.transpose(-1, -2)
    logits = torch.cat((old.transpose(0, 1), new), -1).float()
    logits[..., :tokens] += latents.hidden[:, None, None]
    at = torch.arange(new.shape[-1], device=query.device)
    unseen = at >= raw.seen.repeat(1, heads // kv_heads)[:, None, :, None]
    logits[..., tokens:].masked_fill_(unseen, -torch.inf)
    weights = torch.softmax(logits, -1).to(query.dtype)
    old, new = weights[..., :tokens], weights[..., tokens:]
    # Behind the tokens that are there may be anything, and NaN * 0 is NaN.
    there = at[:, None] < raw.seen.amax(1)[:, None, None, None]
    summed = (old.flatten(1, 2) @ latents.values).unflatten(1, (kv_heads, -1))
    out = summed @ values.decode + old.sum(-1, keepdim=True) * values.mean + new @ raw.values.where(there, 0)
    return out.view(query.shape)
