# SPDX-License-Identifier: Apache-2.0
"""Decode windows of all layers of a group at once.

They need no queries but those that layers have stored (``RecentQueries``), so they are compacted
after the forward pass. A window is small: a few hundred
tokens of one request, or what a budget holds. Layer by layer the host would take longer to queue
the work than a GPU to do it, so a row of the work is a window of one layer, and one pass takes as
many as fit in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from kv_policies.compaction import Layer, Pages, compact_part
from kv_policies.plan import Part
from kv_policies.window_policy import window_policy


class JoinedPages(NamedTuple):
    """The blocks of several layers under one numbering.

    Attributes:
        pages: All blocks.
        first: Number of block 0 of each layer, int64 [L], on the device of the blocks.
        step: From a block of a layer to its next.
    """

    pages: Pages
    first: torch.Tensor
    step: int

    def blocks(self, some: slice, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks of some layers, as ``blocks`` with L times its rows."""
        first = self.first[some].view(-1, *(1 for _ in blocks.shape))
        return (first + blocks * self.step).flatten(0, 1)


def compact_windows(
    windows: Sequence[Part], layers: Sequence[Layer], joined: JoinedPages | None = None
) -> None:
    """Compact decode windows, at any time before their blocks are read again.

    Args:
        windows: The same for all layers: see ``Work``.
        layers: Of one layout and of one shape, in the order in which they store queries.
        joined: Their blocks; None where they cannot be numbered together.
    """
    policy = window_policy(layers[0].policy)
    if joined is None:
        for layer in layers:
            for part in windows:
                compact_part(part, replace(layer, index=None), policy)
        return
    one = replace(layers[0], name="", index=None, pages=joined.pages)
    sinks = [layer.sinks for layer in layers if layer.sinks is not None]
    apart = layers[1].first_recent - layers[0].first_recent if len(layers) > 1 else 0
    for part in windows:
        each = one.space.bytes(len(part.present), part.tokens, one.heads.kv)
        most = max(1, one.space.limit // each)
        for first in range(0, len(layers), most):
            some = slice(first, min(first + most, len(layers)))
            if sinks:
                rows = torch.stack(sinks[some]).repeat_interleave(len(part.present), 0)
                one = replace(one, sinks=rows)
            compact_part(_of_layers(part, joined, some, apart), one, policy)


def _of_layers(part: Part, joined: JoinedPages, some: slice, apart: int) -> Part:
    """A part with a row per layer and window, in order of the layers.

    ``apart``: From a layer's stored queries to those of the next.
    """
    choice, count = part.choice, some.stop - some.start
    assert choice is not None and part.queries is None
    of_layer = torch.arange(count, device=part.blocks.device)[:, None] * len(part.blocks)
    recent = part.recent
    if recent is not None:
        first = torch.arange(some.start, some.stop, device=recent.device) * apart
        recent = (first[:, None, None] + recent).flatten(0, 1)
    return part._replace(
        recent=recent,
        blocks=joined.blocks(some, part.blocks),
        lengths=part.lengths.repeat(count),
        present=part.present * count,
        choice=choice._replace(
            choosable=choice.choosable.repeat(count),
            kept=choice.kept.repeat(count),
            destination=joined.blocks(some, choice.destination),
            source_row=(of_layer + choice.source_row).flatten(),
            source_block=choice.source_block.repeat(count),
        ),
    )
