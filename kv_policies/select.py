# SPDX-License-Identifier: Apache-2.0
"""From scores to kept tokens, and their K/V packed into the destination. No loop, no sync."""

import torch


def select(
    scores: torch.Tensor, lengths: torch.Tensor, kept: torch.Tensor, most: int | None = None
) -> torch.Tensor:
    """Choose the tokens that stay.

    The first and the last valid token stay whatever their score. If only one is kept, it is the
    first.

    Args:
        scores: [R, H, T]. Larger is kept first, equal scores by position, so that the choice is the
            same on every device. NaN counts as the least.
        lengths: Valid tokens per request, int [R].
        kept: Tokens to keep, exactly, int [R], at most ``lengths``; 0 is allowed (a padding row).
        most: Columns of the result, at least ``kept.max()``. None takes that maximum, for which the
            host waits if the tensors are on a GPU.

    Returns:
        Their indices in ascending order, int64 [R, H, most], -1 behind a request's last.
    """
    tokens = scores.shape[-1]
    most = int(kept.max()) if most is None else most
    lengths, kept = lengths[:, None, None], kept[:, None, None]
    at = torch.arange(tokens, device=scores.device)
    scores = scores.float()
    limits = torch.finfo(torch.float32)
    # Finite scores leave the infinities to the ends and to the padding.
    scores = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    scores = scores.masked_fill((at == 0) | (at == lengths - 1), torch.inf)
    scores = scores.masked_fill(at >= lengths, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    rank = torch.arange(best.shape[-1], device=scores.device)
    kept_ones = torch.where(rank < torch.minimum(kept, lengths), best, tokens)
    ascending = kept_ones.sort(dim=-1).values
    return ascending.masked_fill_(ascending == tokens, -1)


def pack(content: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Take K or V of the chosen tokens.

    Args:
        content: [R, Hkv, T, D].
        chosen: [R, H, K] as ``select`` returns it; H is Hkv, or 1 for one choice for all heads.

    Returns:
        [R, Hkv, K, D], in new memory, so that it may be written over the blocks of ``content``.
        Rows chosen by -1 hold what token 0 holds.
    """
    rows, heads, tokens, _ = content.shape
    index = chosen.clamp(min=0).expand(-1, heads, -1)
    first = torch.arange(rows * heads, device=content.device).view(rows, heads, 1) * tokens
    packed = content.reshape(-1, content.shape[-1]).index_select(0, (index + first).flatten())
    return packed.view(*index.shape, -1)
