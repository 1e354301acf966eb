# SPDX-License-Identifier: Apache-2.0
"""Attention over latents of old tokens and raw keys and values of recent ones."""

from typing import NamedTuple, Protocol

import torch

# Elements of rebuilt keys at a time: 2 MiB, which stays in a core's cache.
_TILE = 1 << 19


class Rotation(Protocol):
    """See ``rope.Rope``."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...


class Decoder(NamedTuple):
    """From latents back to keys or values: ``mean + latent @ decode``.

    Attributes:
        affine: float32 [rank + 1, F] for F = Hkv * D features. The last row is the mean, as for a
            latent that is always 1.
    """

    affine: torch.Tensor

    @property
    def decode(self) -> torch.Tensor:
        return self.affine[:-1]

    @property
    def mean(self) -> torch.Tensor:
        return self.affine[-1]


class Latents(NamedTuple):
    """Latents of R requests, padded to N tokens.

    Attributes:
        keys: [R, N, key_rank].
        values: [R, N, value_rank].
        positions: int64 [R, N].
        hidden: float32 [R, N], added to the logits.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor


class Raw(NamedTuple):
    """Raw tokens of R requests.

    Attributes:
        keys: [R, Hkv, T, D].
        values: [R, Hkv, T, D].
        seen: How many of them each query sees, int64 [R, Q].
    """

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
    """Attend to latents and raw tokens in one softmax.

    Keys are rebuilt and rotated to their positions, a tile at a time. Values are not rebuilt. Since
    sum(p * (mean + c @ decode)) = sum(p) * mean + sum(p * c) @ decode, the weighted sum is taken of
    the latents and mapped once. Everything is in float32.

    Args:
        query: [R, Hq, Q, D].
        latents: All older than the queries.
        raw: The other tokens.
        keys: Decodes keys before RoPE.
        values: Decodes values.
        rope: The rotation of keys.
        scale: Factor on q.k in the softmax.

    Returns:
        [R, Hq, Q, D] in the type of ``query``.
    """
    requests, heads, count, width = query.shape
    kv_heads, tokens = raw.keys.shape[1], latents.keys.shape[1]
    # Queries of the heads of a group are rows of one product per KV head.
    rows = (query.float() * scale).reshape(requests, kv_heads, -1, width)
    new = rows @ raw.keys.float().mT
    logits = new.new_empty(*new.shape[:3], tokens + new.shape[3])
    logits[..., tokens:] = new
    _old_logits(rows, latents, keys, rope, logits[..., :tokens])
    at = torch.arange(new.shape[3], device=query.device)
    unseen = at >= raw.seen.repeat(1, heads // kv_heads)[:, None, :, None]
    logits[..., tokens:].masked_fill_(unseen, -torch.inf)
    weights = torch.softmax(logits, -1)
    old, new = weights[..., :tokens], weights[..., tokens:]
    summed = old.flatten(1, 2) @ latents.values.float()
    mapped = summed.unflatten(1, (kv_heads, -1)) @ _by_head(values.decode, kv_heads)
    means = old.sum(-1, keepdim=True) * _by_head(values.mean[None], kv_heads)
    # Behind the tokens that are there may be anything, and NaN * 0 is NaN.
    there = at[:, None] < raw.seen.amax(1)[:, None, None, None]
    out = mapped + means + new @ raw.values.where(there, 0).float()
    return out.view(query.shape).to(query.dtype)


def _old_logits(
    rows: torch.Tensor, latents: Latents, keys: Decoder, rope: Rotation, logits: torch.Tensor
) -> None:
    """Logits [R, Hkv, M, N] of rows [R, Hkv, M, D], scaled queries, over latents."""
    requests, kv_heads, count, width = rows.shape
    features = kv_heads * width
    # Zeros for the other heads' features: one product per request, with no loop over heads and no
    # copy of the keys.
    spread = rows.new_zeros(requests, kv_heads, count, kv_heads, width)
    spread.diagonal(dim1=1, dim2=3).copy_(rows.permute(0, 2, 3, 1))
    spread = spread.view(requests, -1, features)
    # One place for all tiles: fresh memory costs a CPU more than the product.
    tile = min(max(32, _TILE // (requests * features)), logits.shape[3])
    taken = rows.new_ones(requests * tile, len(keys.affine))
    room = rows.new_empty(requests * tile, features)
    for start in range(0, logits.shape[3], tile):
        part = slice(start, start + tile)
        old = latents.keys[:, part]
        flat = taken[: old.shape[0] * old.shape[1]]
        flat[:, :-1].view(old.shape).copy_(old)
        rebuilt = torch.mm(flat, keys.affine, out=room[: len(flat)]).view(-1, kv_heads, width)
        rebuilt = rope.rotate(rebuilt, latents.positions[:, part].flatten())
        products = spread @ rebuilt.view(requests, -1, features).mT
        logits[..., part] = products.view(requests, kv_heads, count, -1)
    logits += latents.hidden[:, None, None]


def _by_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[rows, F] to [Hkv, rows, D]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1)
