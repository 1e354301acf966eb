# SPDX-License-Identifier: Apache-2.0
"""The layout of latents: all tokens but the last ones, in order, many to a block.

From the end of the prompt on, tokens become latents once ``recent`` newer ones are there: those of
the prompt together, in whole ``unit``s, then generated ones ``window`` by window. A latent block
takes ``tokens`` of them. Each window fills up the block that the one before began; where it needs
another, one of its own columns becomes that block::

    N prompt tokens, blocks of 32, tokens = 160, recent = unit = window = 32

    column       0  1  2  3  4  5  6  7 | 8  9  10 11 12 | ..
    at N = 290   -  -  -  -  -  - L0 L1 | r  r                latents of 256: 160 and 96
    at 320       -  -  -  -  -  - L0 L1 | -  r  r              288: column 8 went into L1
    at 352       -  -  -  -  -  - L0 L1 | -  -  r  r           320: L1 is full
    at 384       -  -  -  -  -  - L0 L1 | -  -  L2 r  r        352: column 10 became L2

So between ``recent`` and ``recent + window`` tokens are raw at any time, and those of a prompt that
were not whole units. Tokens of a prompt shorter than ``min_prompt`` stay raw for ever, up to the
block boundary behind it: latents ``start`` there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

import torch

from compress_common.errors import joined
from kv_policies.layout.base import Layout, Segment

T = TypeVar("T", int, torch.Tensor)


class LatentBlocks(NamedTuple):
    """The latent blocks of R requests, int64 [R, L]: column, position of the first token, tokens.

    Ordered by position. Those that only pad a row have no tokens and its first column.
    """

    column: torch.Tensor
    first: torch.Tensor
    tokens: torch.Tensor


class Spans(NamedTuple):
    """Int64 [R]: tokens ``[start, start + old)`` are latents, the first ``prompt`` of them since
    the prompt's end."""

    start: torch.Tensor
    prompt: torch.Tensor
    old: torch.Tensor


@dataclass(frozen=True)
class LatentLayout(Layout):
    """The layout of layers whose latents take the same room: see the module's text.

    block_size: tokens per raw block.
    tokens: per latent block, at least block_size; 0: nothing becomes a latent.
    unit: tokens of a prompt that become latents together, a multiple of block_size.
    window: generated tokens that become latents together, a multiple of unit. Larger: less often,
        more memory. 0: they stay raw.
    recent: last tokens that stay raw, a multiple of block_size. Larger: less is lost, less saved.
    min_prompt: shorter prompts stay raw, a multiple of block_size.
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

    @property
    def timing(self) -> tuple[object, ...]:
        return LatentLayout, *(
            getattr(self, name) for name in ("block_size", "unit", "window", "min_prompt", "recent")
        )

    def opted_out(self) -> "LatentLayout":
        return replace(self, tokens=0)

    # -- one request: the scheduler's side -------------------------------------------------------

    def gap(self, n: int) -> int:
        prompt = self._prompt(n)
        return prompt // self.block_size - self.blocks(prompt)

    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        if n <= 0 or not self.tokens:
            return
        start, prompt = self._start(n), self._prompt(n)
        if prompt and after < n <= c:
            yield Segment(0, prompt // self.block_size, self.blocks(prompt), n)
        for index in range(self._windows(n, after), self._windows(n, c)):
            before = prompt + index * self.window
            old = before + self.window
            stop = (start + old) // self.block_size
            kept = self.blocks(old) - self.blocks(before)
            size = self.window // self.block_size
            yield Segment(stop - size, stop, kept, start + old + self.recent)

    def first_destination(self, n: int) -> int | None:
        if not self.tokens:
            return None
        if prompt := self._prompt(n):
            return prompt // self.block_size - self.blocks(prompt)
        if not self.window:
            return None
        return (self._start(n) + self.window) // self.block_size - self.blocks(self.window)

    def _start(self, n: int) -> int:
        return 0 if n >= self.min_prompt else -(-n // self.block_size) * self.block_size

    def _prompt(self, n: int) -> int:
        """Tokens of a prompt that become latents at its end."""
        if n < self.min_prompt or not self.tokens:
            return 0
        return max(0, n - self.recent) // self.unit * self.unit

    def _windows(self, n: int, c: int) -> int:
        """Decode windows complete at c."""
        if not self.window:
            return 0
        return max(0, c - self.recent - self._start(n) - self._prompt(n)) // self.window

    # -- a batch: the worker's side --------------------------------------------------------------

    def spans(
        self, n: torch.Tensor, c: torch.Tensor, opted_out: torch.Tensor | None = None
    ) -> Spans:
        """What is latents at c."""
        n, c = n.long(), c.long()
        long = n >= self.min_prompt
        start = ((n + (self.block_size - 1)) // self.block_size * self.block_size).mul_(~long)
        prompt = ((n - self.recent).clamp_(min=0) // self.unit * self.unit).mul_(long)
        old = prompt
        if self.window:
            since = (c - self.recent - start - prompt).clamp_(min=0)
            old = prompt + since // self.window * self.window
        old = old * ((c >= n) & (n > 0) & bool(self.tokens))
        if opted_out is not None:
            old.mul_(~opted_out)
        return Spans(start, prompt, old)

    def column(
        self, index: torch.Tensor, start: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """The column of the latent block that is ``index``-th of its request; the rest as Spans."""
        window = self.window or 1
        # Latents when this block has come: those of the prompt, or up to the end of a window.
        later = (index * self.tokens - prompt).div(window, rounding_mode="floor") + 1
        old = prompt + later.clamp_(min=0) * window
        return (start + old) // self.block_size - self.blocks(old) + index

    def blocks(self, old: T) -> T:
        """Latent blocks that hold so many tokens."""
        return -(-old // (self.tokens or 1))

    def window_ends(self, n: torch.Tensor, c: torch.Tensor, q: torch.Tensor) -> bool:
        return bool((self.spans(n, c + q).old > self.spans(n, c).old).any())

    def is_cut(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        q: torch.Tensor,
        opted_out: torch.Tensor | None = None,
    ) -> bool:
        before = self.spans(n, c + q - 1, opted_out)
        return bool((before.old > self.spans(n, c, opted_out).old).any())

    def moves(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        width: int,
        opted_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, _, old = self.spans(n, c, opted_out)
        at = torch.arange(width, device=n.device)
        moved = old // self.block_size
        columns = at + moved[:, None] * (at >= (start // self.block_size)[:, None])
        return columns.clamp_(max=width - 1), old

    def latent_blocks(
        self, n: torch.Tensor, c: torch.Tensor, opted_out: torch.Tensor | None = None
    ) -> LatentBlocks:
        """The latent blocks at c. Sizes depend on values: call it with tensors on the CPU."""
        start, prompt, old = (x[:, None] for x in self.spans(n, c, opted_out))
        total = self.blocks(old)
        index = torch.arange(int(total.max()) if len(total) else 0)
        index = torch.where(index < total, index, 0)
        held = old - torch.arange(index.shape[1]) * self.tokens
        return LatentBlocks(
            torch.where(total > 0, self.column(index, start, prompt), 0),
            start + index * self.tokens,
            held.clamp_(0, self.tokens),
        )
