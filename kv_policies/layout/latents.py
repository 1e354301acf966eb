# SPDX-License-Identifier: Apache-2.0
"""The layout of latents: all tokens except the last ones, in order, many to a block.

From the end of the prompt on, a token becomes a latent once ``recent`` newer tokens are there. The
tokens of the prompt become latents together, in whole ``unit``s, and generated tokens ``window`` by
window. A latent block holds ``tokens`` of them. Each window fills up the block that the one before
began. When it needs another block, one of its own columns becomes that block::

    N prompt tokens, blocks of 32, tokens = 160, recent = unit = window = 32

    column       0  1  2  3  4  5  6  7 | 8  9  10 11 12 | ..
    at N = 290   -  -  -  -  -  - L0 L1 | r  r                latents of 256: 160 and 96
    at 320       -  -  -  -  -  - L0 L1 | -  r  r              288: column 8 went into L1
    at 352       -  -  -  -  -  - L0 L1 | -  -  r  r           320: L1 is full
    at 384       -  -  -  -  -  - L0 L1 | -  -  L2 r  r        352: column 10 became L2

So ``recent`` to ``recent + window`` tokens are raw at any time, and the tokens of a prompt that did
not fill a unit. A prompt shorter than ``min_prompt`` always stays raw, up to the block boundary
behind
it: latents ``start`` there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from compress_common.errors import joined
from kv_policies.layout.base import Layout
from kv_policies.layout.segments import IntArray, Ints, positive


class LatentBlocks(NamedTuple):
    """Latent blocks, int64 [G, R, L] for R requests in G layouts, in order of position.

    Attributes:
        column: Of the block.
        first: Position of its first token.
        tokens: Tokens that it holds; 0 for a block that only pads a row.
    """

    column: IntArray
    first: IntArray
    tokens: IntArray


class Spans(NamedTuple):
    """Which tokens of R requests are latents: ``[start, start + old)``, int64 [R] each.

    The first ``prompt`` of them became latents when the prompt ended.
    """

    start: IntArray
    prompt: IntArray
    old: IntArray


@dataclass(frozen=True)
class LatentLayout(Layout):
    """The layout of layers whose latents take the same room: see the module's text.

    Attributes:
        block_size: Tokens per raw block.
        tokens: Tokens per latent block, at least block_size; 0: nothing becomes a latent.
        unit: Tokens of a prompt that become latents together, a multiple of block_size.
        window: Generated tokens that become latents together, a multiple of unit. Larger: less
            often, more memory. 0: they stay raw.
        recent: Last tokens that stay raw, a multiple of block_size. Larger: less is lost and less
            is saved.
        min_prompt: Shorter prompts stay raw; a multiple of block_size.
    """

    block_size: int
    tokens: int
    unit: int
    window: int = 0
    min_prompt: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        problems = self._not_whole_blocks("unit", "window", "min_prompt", "recent")
        if not self.unit:
            problems.append("unit must not be 0")
        elif self.window % self.unit:
            problems.append(f"window must be a multiple of {self.unit} tokens, got {self.window}")
        if self.tokens and self.tokens < self.block_size:
            problems.append(
                f"a latent block of {self.tokens} tokens is less than the block size "
                f"{self.block_size}"
            )
        if problems:
            raise joined(problems)

    @property
    def share(self) -> Fraction:
        return Fraction(self.block_size, self.tokens or self.block_size)

    @cached_property
    def timing(self) -> tuple[object, ...]:
        fields = self.block_size, self.unit, self.window, self.min_prompt, self.recent
        return LatentLayout, *(fields if self.tokens else ())

    @property
    def compacts_windows(self) -> bool:
        return bool(self.window and self.tokens)

    def blocks(self, old: Ints) -> Ints:
        """Latent blocks that hold so many tokens."""
        return -(-old // (self.tokens or 1))

    def prompt(self, n: Ints) -> Ints:
        return self._prompt(n) // self.block_size

    def windows(self, n: Ints, c: Ints) -> Ints:
        if not self.compacts_windows:
            return 0 * n
        aged = positive(c - self.recent - self._start(n) - self._prompt(n))
        return aged // self.window * (n > 0)

    def window_at(self, n: Ints, index: Ints) -> tuple[Ints, Ints, Ints]:
        end = self._start(n) + self._prompt(n) + (index + 1) * self.window
        stop = end // self.block_size
        return stop - self.window // self.block_size, stop, end + self.recent

    def stays(self, n: Ints, start: Ints, stop: Ints) -> Ints:
        before, after = (x * self.block_size - self._start(n) for x in (start, stop))
        return self.blocks(after) - self.blocks(before)

    def compacts(self, size: int, stays: int) -> bool:
        return size > 0  # what stays becomes latents too

    def _start(self, n: Ints) -> Ints:
        """The first token that can become a latent."""
        return -(-n // self.block_size) * self.block_size * (n < self.min_prompt)

    def _prompt(self, n: Ints) -> Ints:
        """Tokens of a prompt that become latents at its end."""
        whole = positive(n - self.recent) // self.unit * self.unit
        return whole * (n >= self.min_prompt) * (self.tokens > 0)

    def hidden(self, phase: IntArray) -> IntArray:
        return self.spans(phase).old

    def columns(self, phase: IntArray, hidden: IntArray, width: int) -> IntArray:
        start, old = (x[:, None] // self.block_size for x in (self._start(phase[0]), hidden))
        at = np.arange(width)
        columns: IntArray = at + old * (at >= start)
        return columns

    def spans(self, phase: IntArray) -> Spans:
        """What is latents, of requests whose prompt is complete: see ``phase``."""
        n, windows = phase
        prompt = self._prompt(n)
        return Spans(self._start(n), prompt, prompt + windows * self.window)


def latent_columns(
    layout: LatentLayout, tokens: Ints, index: Ints, start: Ints, prompt: Ints
) -> Ints:
    """The column of a latent block.

    Args:
        layout: Any of one timing.
        tokens: Its tokens per block. Arrays are for several layouts of this timing.
        index: Which of a request's latent blocks.
        start: See ``Spans``.
        prompt: See ``Spans``.
    """
    window = layout.window or 1
    # Latents when this block has come: those of the prompt, or up to the end of a window.
    old = prompt + positive((index * tokens - prompt) // window + 1) * window
    return (start + old) // layout.block_size - -(-old // tokens) + index


def latent_blocks(layouts: Sequence[LatentLayout], spans: Spans) -> LatentBlocks:
    """The latent blocks of R requests in G layouts of one timing.

    L is as many as the request with most has, in the layout of least tokens per block.
    """
    start, prompt, old = (x[:, None] for x in spans)
    tokens = np.array([layout.tokens or 1 for layout in layouts])[:, None, None]
    total = -(-old // tokens)
    index = np.arange(total.max(initial=0))
    held = (old - index * tokens).clip(0, tokens)
    index = np.where(index < total, index, 0)
    column = np.where(total > 0, latent_columns(layouts[0], tokens, index, start, prompt), 0)
    return LatentBlocks(column, start + index * tokens, held)
