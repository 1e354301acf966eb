# SPDX-License-Identifier: Apache-2.0
"""Which columns hold raw tokens and which hold latents, where kept blocks are packed latents.

The same layout as for chosen tokens (see ``layout``): only what lies in a segment's destination is
something else, so that attention reads it in another way. ``tokens`` is how many tokens one latent
block holds, in order; the last one of a segment may hold fewer.
"""

from typing import NamedTuple

import torch

from kv_policies.layout import Layout


class LatentBlocks(NamedTuple):
    """The latent blocks of R requests, int64 [R, L]: column, position of the first token, tokens.

    Ordered by position. Those that only pad a row have no tokens and its first column.
    """

    column: torch.Tensor
    first: torch.Tensor
    tokens: torch.Tensor


def raw_columns(
    layout: Layout,
    n: torch.Tensor,
    c: torch.Tensor,
    width: int,
    opted_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of raw tokens at c, int64 [R, width], and the tokens that are not, int64 [R].

    n, c, opted_out: as in ``Layout.moves``, and so is what lies behind a row's last column.
    """
    gap, windows = layout.gaps(n, c, opted_out)
    hidden = torch.where(gap > 0, layout.prompt_blocks_of(n), 0)
    moved = windows * (layout.window // layout.block_size)
    at = torch.arange(width, device=n.device) + hidden[:, None]
    boundary = (n.long() + (layout.block_size - 1)) // layout.block_size
    columns = torch.where(at >= boundary[:, None], at + moved[:, None], at)
    return columns.clamp_(max=width - 1), (hidden + moved) * layout.block_size


def latent_blocks(
    layout: Layout,
    n: torch.Tensor,
    c: torch.Tensor,
    tokens: int,
    opted_out: torch.Tensor | None = None,
) -> LatentBlocks:
    """The latent blocks at c. Sizes depend on values: call it with tensors on the CPU."""
    gap, windows = layout.gaps(n, c, opted_out)
    size, bs = layout.window // layout.block_size, layout.block_size
    kept = layout.kept(size) if size else 1
    prompt = torch.where(gap > 0, layout.prompt_blocks_of(n), 0)
    of_prompt = prompt - gap
    total = of_prompt + windows * kept
    at = torch.arange(int(total.max()) if len(total) else 0).expand(len(n), -1)
    later = at - of_prompt[:, None]
    window, block = later.div(kept, rounding_mode="floor"), later % kept
    start = (n.long() + (bs - 1))[:, None] // bs + window * size
    is_prompt = later < 0
    first = torch.where(is_prompt, at * tokens, start * bs + block * tokens)
    held = torch.where(
        is_prompt, prompt[:, None] * bs - at * tokens, layout.window - block * tokens
    )
    column = torch.where(is_prompt, at + gap[:, None], start + (size - kept) + block)
    there = at < total[:, None]
    return LatentBlocks(
        torch.where(there, column, column[:, :1]),
        torch.where(there, first, 0),
        torch.where(there, held.clamp(0, tokens), 0),
    )
