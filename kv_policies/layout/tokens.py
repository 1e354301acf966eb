# SPDX-License-Identifier: Apache-2.0
"""The layout of chosen tokens: a segment's last columns hold the tokens of it that were kept.

N prompt tokens, bs = block_size, nfull = N // bs, w = window // bs, keep = 1/4::

    column      0  1  2  3  4  5  6  7 | 8    | 9 10 11 12 | 13 14 15 16 | 17 18 ..
    segment     prompt (nfull = 8)     | tail | window 0   | window 1    | not complete
    complete at N                      | -    | 13 * bs    | 17 * bs     |
    live        -  -  -  -  -  - K0 K1 | raw  | -  -  - K  | -  -  -  K  | raw raw ..

- The prompt segment is columns ``[0, nfull)``, complete when N tokens are computed.
- The tail, the block that holds both the end of the prompt and the first generated tokens, stays
  raw for ever. There is none when bs divides N.
- Decode window i is columns ``[d + i * w, d + (i + 1) * w)`` with ``d = ceil(N / bs)``: windows are
  counted from the first block boundary at or after N, so each is whole blocks. It is complete when
  its last token is computed.
- ``kept = min(size, max(min_blocks, ceil(keep * size)))`` of a segment's ``size`` columns, in
  exact integer arithmetic: the last ones. Nothing is freed where that equals ``size``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch

from compress_common.errors import joined
from kv_policies.layout.base import Layout, Segment, runs

# Keeps num * columns inside int64 for any realistic prompt.
_MAX_DENOMINATOR = 10**9


class SegmentBatch(NamedTuple):
    """Segments of several requests, int64 [S] each: see Segment. Ordered by row, then by ``ends``.

    ``row`` is the request's row in the batch. A row occurs more than once only in the step of a
    resumed request.
    """

    row: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    kept: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class TokenLayout(Layout):
    """The layout of the layers that share one keep level: see the module's text.

    block_size: tokens per block, at least 2 (a kept block must hold a segment's first and last).
    keep: exact share of a segment's blocks that stays, in (0, 1]. Smaller: less memory, more loss.
    window: generated tokens per decode window, a multiple of block_size. Smaller: memory is given
        back earlier, each choice sees less. 0: generated tokens are never compacted.
    min_blocks: blocks that a compacted segment keeps at least. Larger: short prompts lose less.
    min_prompt: prompts of fewer tokens are not compacted (their decode windows are); a multiple of
        block_size, so that a prompt's full blocks, all that a cache lookup knows of it, tell.
    """

    block_size: int
    keep: Fraction
    window: int = 0
    min_blocks: int = 1
    min_prompt: int = 0

    def __post_init__(self) -> None:
        problems = self._not_whole_blocks("window", "min_prompt")
        if not isinstance(self.keep, Fraction):
            problems.append(f"keep must be an exact Fraction, got {self.keep!r}")
        elif not 0 < self.keep <= 1:
            problems.append(f"keep must be in (0, 1], got {self.keep}")
        elif self.keep.denominator > _MAX_DENOMINATOR:
            problems.append(f"keep needs a denominator up to {_MAX_DENOMINATOR}, got {self.keep}")
        if self.min_blocks < 1:
            problems.append(f"min_blocks must be at least 1, got {self.min_blocks}")
        if problems:
            raise joined(problems)

    @property
    def share(self) -> Fraction:
        return self.keep

    @property
    def timing(self) -> tuple[object, ...]:
        return TokenLayout, self.block_size, self.window

    def opted_out(self) -> "TokenLayout":
        return replace(self, keep=Fraction(1))

    # -- one request: the scheduler's side -------------------------------------------------------

    def kept(self, size: int) -> int:
        """Blocks that stay of a segment of ``size`` blocks."""
        share = -(-self.keep.numerator * size // self.keep.denominator)
        return min(size, max(self.min_blocks, share))

    def gap(self, n: int) -> int:
        size = n // self.block_size
        return 0 if n < self.min_prompt else size - self.kept(size)

    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        if n <= 0:
            return
        gap = self.gap(n)
        if gap and after < n <= c:
            prompt = n // self.block_size
            yield Segment(0, prompt, prompt - gap, n)
        size = self.window // self.block_size
        kept = self.kept(size)
        if kept == size:
            return
        for index in range(self._windows(n, after), self._windows(n, c)):
            stop = -(-n // self.block_size) + (index + 1) * size
            yield Segment(stop - size, stop, kept, stop * self.block_size)

    def _windows(self, n: int, c: int) -> int:
        """Decode windows complete at c."""
        if not self.window:
            return 0
        boundary = -(-n // self.block_size) * self.block_size
        return max(0, c - boundary) // self.window

    def live(self, n: int, c: int, columns: int) -> list[int]:
        """The columns below ``columns`` that attention reads in a step that starts at c."""
        live: list[int] = []
        at = 0
        for first, stop in self.freed(n, c):
            live.extend(range(at, first))
            at = stop
        live.extend(range(at, columns))
        return live

    def seq_len(self, n: int, c: int, q: int) -> int:
        """Tokens that attention sees in the step ``[c, c + q)``, the new ones included."""
        return c + q - sum(stop - first for first, stop in self.freed(n, c)) * self.block_size

    def first_destination(self, n: int) -> int | None:
        if gap := self.gap(n):
            return gap
        size = self.window // self.block_size
        if self.kept(size) == size:
            return None
        return -(-n // self.block_size) + size - self.kept(size)

    # -- a batch: the worker's side --------------------------------------------------------------

    def gaps(
        self, n: torch.Tensor, c: torch.Tensor, opted_out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Freed prompt blocks and complete windows at c, int64 [R] each.

        n, c: int [R], prompt length and computed tokens per request; n = 0 is a padding row.
        opted_out: bool [R], requests that keep everything.
        """
        n, c = n.long(), c.long()
        gap = self._prompt_gap(n).mul_((c >= n) & (n > 0))
        windows = self._windows_batch(n, c)
        if opted_out is not None:
            gap, windows = gap.mul_(~opted_out), windows.mul_(~opted_out)
        return gap, windows

    def _prompt_gap(self, n: torch.Tensor) -> torch.Tensor:
        size = n // self.block_size
        # size - ceil(keep * size) = floor((1 - keep) * size): one operation less.
        freed = size * (self.keep.denominator - self.keep.numerator) // self.keep.denominator
        if self.min_blocks > 1:
            freed = torch.minimum(freed, (size - self.min_blocks).clamp_(min=0))
        return freed.mul_(n >= self.min_prompt) if self.min_prompt else freed

    def _windows_batch(self, n: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        size = self.window // self.block_size
        if self.kept(size) == size:  # also without windows
            return torch.zeros_like(n)
        boundary = (n + (self.block_size - 1)) // self.block_size * self.block_size
        return (c - boundary).clamp_(min=0).div_(self.window, rounding_mode="floor").mul_(n > 0)

    def window_ends(self, n: torch.Tensor, c: torch.Tensor, q: torch.Tensor) -> bool:
        if not self.window:
            return False
        n, c, q = n.numpy(), c.numpy(), q.numpy()  # a third of torch's time for a few numbers
        since = c - -(-n // self.block_size) * self.block_size
        return bool(((since + q) // self.window > since // self.window).any())

    def is_cut(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        q: torch.Tensor,
        opted_out: torch.Tensor | None = None,
    ) -> bool:
        ending = self.ending_batch(n, c, q, opted_out)
        return bool((ending.ends != (c + q)[ending.row]).any())

    def moves(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        width: int,
        opted_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gap, windows = self.gaps(n, c, opted_out)
        size = self.window // self.block_size
        kept = self.kept(size)
        at = torch.arange(width, device=n.device)
        freed = gap
        columns = at + gap[:, None]
        if kept < size:
            # Before the live column `at`, `ahead` windows have given their columns away.
            head = (n.long() + (self.block_size - 1)) // self.block_size - gap
            ahead = (at - head[:, None]).div_(kept, rounding_mode="floor").add_(1).clamp_(min=0)
            columns += torch.minimum(ahead, windows[:, None]).mul_(size - kept)
            freed = gap + windows * (size - kept)
        return columns.clamp_(max=width - 1), freed * self.block_size

    def view(
        self,
        table: torch.Tensor,
        n: torch.Tensor,
        c: torch.Tensor,
        q: torch.Tensor,
        opted_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table and sequence lengths that attention gets in the step ``[c, c + q)``.

        table: int [R, C], physical block of each column. It is not written.
        n, c, q: int [R], prompt length, computed tokens and new tokens per request.

        Returns the live blocks, moved left, [R, C], and the tokens seen, int32 [R].
        """
        columns, freed = self.moves(n, c, table.shape[1], opted_out)
        return table.gather(1, columns), (c + q - freed).to(torch.int32)

    def ending_batch(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        q: torch.Tensor,
        opted_out: torch.Tensor | None = None,
    ) -> SegmentBatch:
        """``ending`` for a batch. Sizes depend on values: call it with tensors on the CPU."""
        n, c, q = n.long(), c.long(), q.long()
        gap, before = self.gaps(n, c, opted_out)
        gap_after, after = self.gaps(n, c + q, opted_out)
        prompt_ends = (gap_after > gap).long()
        count = prompt_ends + after - before
        row, index = runs(count)
        index -= prompt_ends[row]  # the prompt, where it ends, comes first
        is_prompt = index < 0
        size = self.window // self.block_size
        prompt = n[row] // self.block_size
        blocks = (n[row] + (self.block_size - 1)) // self.block_size
        stop = torch.where(is_prompt, prompt, blocks + (before[row] + index + 1) * size)
        return SegmentBatch(
            row=row,
            start=torch.where(is_prompt, 0, stop - size),
            stop=stop,
            kept=torch.where(is_prompt, prompt - gap_after[row], self.kept(size)),
            ends=torch.where(is_prompt, n[row], stop * self.block_size),
        )
