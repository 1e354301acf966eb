# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request are live: one pure function, called by scheduler and worker alike.

A request's logical block list has columns 0, 1, 2, ...; column j holds the KV of token positions
``[j * bs, (j + 1) * bs)`` when they are written. The columns are cut into *segments*. When a
segment is complete, its content is rewritten into its own last ``kept`` columns (the destination)
and its other columns are freed::

    N prompt tokens, bs = block_size, nfull = N // bs, w = window // bs, keep = 1/4

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
  exact integer arithmetic. Nothing is freed where that equals ``size``.
- With ``recent = r * bs`` the last r full blocks of the prompt join the tail (the prompt segment is
  columns ``[0, nfull - r)``), and a window is complete when ``recent`` more tokens are computed. So
  the last ``recent`` tokens are raw at any time.

Everything is a function of (N, c), c being the tokens computed before a step. Nothing depends on
how the tokens were cut into steps, so both sides agree after chunked prefill, preemption and
resume without telling each other anything.

What the engine does in a step that computes tokens ``[c, c + q)``:

1. Write K/V of the new tokens at their positions, as always.
2. Attend with ``view(table, n, c, q)``: segments complete *at c* are compacted in it, those that
   complete during this step are still raw.
3. Compact each segment of ``ending(n, c, q)``: those with ``c < complete at <= c + q``. They hold
   raw content for certain: no earlier step since the request (re)started compacted them, and their
   tokens were all computed since, or hit in the cache in front of the destination.
4. Free ``freed(n, processed)`` on the scheduler's side once a step has settled, ``processed`` being
   the computed tokens less those in flight. Steps in flight never read these columns: their c is
   already past the segment.

A fresh request never computes past N in the step that ends its prompt, and completes a window with
the last token of a step. Only a *resumed* request, whose prompt and generated tokens are recomputed
as one prefill, has steps that cross N or several windows. Two rules make it well defined:

- It restarts at most at ``first_destination(n)`` columns (a prefix-cache hit capped there, or 0):
  from that column on its blocks are its own and raw until compacted again. The N of this is the
  prompt length, never prompt plus generated tokens.
- Its step is run as the ``substeps(n, c, q)``, in order, inside each layer's attention: attend,
  compact, attend to what is left, and so on. Then each token sees exactly what it saw before the
  preemption. (Attending once with c's view and compacting all ending segments afterwards is
  consistent too, but lets recomputed tokens see more than they did, so texts can change.)

Limits: with ``window > 0`` no speculative tokens, as a rejected draft could take back the end of a
window that is already compacted (the prompt's end is never taken back, so 0 allows them). N must
not grow (streaming input). Positions shared over ranks (DCP, PCP) are not described.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch

from compress_common.errors import joined

# Keeps num * columns inside int64 for any realistic prompt.
_MAX_DENOMINATOR = 10**9


class Segment(NamedTuple):
    """Columns ``[start, stop)``, compacted into the last ``kept`` once ``ends`` tokens are there.

    ``ends`` is in tokens, everything else in columns (blocks).
    """

    start: int
    stop: int
    kept: int
    ends: int

    @property
    def freed(self) -> tuple[int, int]:
        """The columns that go back to the pool, as a half-open range."""
        return self.start, self.stop - self.kept

    @property
    def destination(self) -> tuple[int, int]:
        """The columns that hold the kept content, as a half-open range."""
        return self.stop - self.kept, self.stop


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
class Layout:
    """The layout of the layers that share one keep level: see the module's text.

    block_size: tokens per block, at least 2 (a kept block must hold a segment's first and last).
    keep: exact share of a segment's blocks that stays, in (0, 1]. Smaller: less memory, more loss.
    window: generated tokens per decode window, a multiple of block_size. Smaller: memory is given
        back earlier, each choice sees less. 0: generated tokens are never compacted.
    min_blocks: blocks that a compacted segment keeps at least. Larger: short prompts lose less.
    min_prompt: prompts of fewer tokens are not compacted (their decode windows are); a multiple of
        block_size, so that a prompt's full blocks, all that a cache lookup knows of it, tell.
    recent: last tokens that stay raw, a multiple of block_size. Larger: less is lost, less saved.
    """

    block_size: int
    keep: Fraction
    window: int = 0
    min_blocks: int = 1
    min_prompt: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.block_size < 2:
            problems.append(f"block_size must be at least 2 tokens, got {self.block_size}")
        if not isinstance(self.keep, Fraction):
            problems.append(f"keep must be an exact Fraction, got {self.keep!r}")
        elif not 0 < self.keep <= 1:
            problems.append(f"keep must be in (0, 1], got {self.keep}")
        elif self.keep.denominator > _MAX_DENOMINATOR:
            problems.append(f"keep needs a denominator up to {_MAX_DENOMINATOR}, got {self.keep}")
        for name in ("window", "min_prompt", "recent"):
            tokens = getattr(self, name)
            if tokens < 0 or (self.block_size >= 2 and tokens % self.block_size):
                problems.append(
                    f"{name} must be 0 or a multiple of the block size {self.block_size}, "
                    f"got {tokens}"
                )
        if self.min_blocks < 1:
            problems.append(f"min_blocks must be at least 1, got {self.min_blocks}")
        if problems:
            raise joined(problems)

    def opted_out(self) -> "Layout":
        """The layout of a request that keeps everything: ``opted_out`` in the batched functions."""
        return replace(self, keep=Fraction(1))

    # -- one request: the scheduler's side -------------------------------------------------------

    def kept(self, size: int) -> int:
        """Blocks that stay of a segment of ``size`` blocks."""
        share = -(-self.keep.numerator * size // self.keep.denominator)
        return min(size, max(self.min_blocks, share))

    def prompt_blocks(self, n: int) -> int:
        """Blocks of the prompt segment of N = n tokens."""
        return max(0, n // self.block_size - self.recent // self.block_size)

    def gap(self, n: int) -> int:
        """Blocks that the prompt segment of N = n tokens frees, once: columns ``[0, gap)``."""
        size = self.prompt_blocks(n)
        return 0 if n < self.min_prompt else size - self.kept(size)

    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        """Segments that free something and end in ``after < ends <= c``, in order of ``ends``."""
        if n <= 0:
            return
        gap, prompt = self.gap(n), self.prompt_blocks(n)
        if gap and after < n <= c:
            yield Segment(0, prompt, prompt - gap, n)
        size = self.window // self.block_size
        kept = self.kept(size)
        if kept == size:
            return
        for index in range(self._windows(n, after), self._windows(n, c)):
            stop = -(-n // self.block_size) + (index + 1) * size
            yield Segment(stop - size, stop, kept, stop * self.block_size + self.recent)

    def _windows(self, n: int, c: int) -> int:
        """Decode windows complete at c."""
        if not self.window:
            return 0
        boundary = -(-n // self.block_size) * self.block_size
        return max(0, c - boundary - self.recent) // self.window

    def freed(self, n: int, c: int, after: int = 0) -> list[tuple[int, int]]:
        """Column ranges ``[first, stop)`` that are free at c and were not yet at ``after``."""
        return [segment.freed for segment in self.segments(n, c, after)]

    def ending(self, n: int, c: int, q: int) -> list[Segment]:
        """Segments to compact at the end of the step that computes tokens ``[c, c + q)``."""
        return list(self.segments(n, c + q, after=c))

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

    def substeps(self, n: int, c: int, q: int) -> list[tuple[int, int]]:
        """The step ``[c, c + q)`` cut after each segment that ends in it: [(c, q), ...].

        One element, the step itself, unless a resumed request recomputes past a segment's end.
        """
        cuts = [segment.ends for segment in self.ending(n, c, q)]
        if not cuts or cuts[-1] != c + q:
            cuts.append(c + q)
        return [(a, b - a) for a, b in zip([c, *cuts], cuts, strict=False)]

    def first_destination(self, n: int) -> int | None:
        """First column that is ever overwritten by a compaction; None when there is none.

        The columns before it hold the exact, uncompressed KV of their tokens for as long as the
        request lives, and remain so after they are freed. So they, and only they, may be shared:
        see ``cacheable`` and ``hit_limit``.
        """
        if gap := self.gap(n):
            return gap
        size = self.window // self.block_size
        if self.kept(size) == size:
            return None
        return -(-n // self.block_size) + size - self.kept(size)

    def cacheable(self, n: int, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens may be hashed for prefix caching.

        Blocks are hashed when they are allocated, before they are overwritten, so the cap holds
        from the first step on.
        """
        first = self.first_destination(n)
        return tokens if first is None else min(tokens, first * self.block_size)

    def hit_limit(self, n: int) -> int:
        """The longest prefix-cache hit, in tokens, that a request of N = n may start from.

        A hit never reaches a destination, so no block shared with others is overwritten, and it
        leaves at least the last prompt token to compute. For a resumed request n is still the
        prompt length. With only the prompt's full blocks at hand, ``cacheable`` of their tokens is
        at most this.
        """
        return self.cacheable(n, max(0, n - 1)) // self.block_size * self.block_size

    def first_private(self, n: int) -> int:
        """First prompt position whose query every request computes itself, cache hit or not.

        Scores that use queries from here on only are the same with prefix caching on and off.
        """
        return self.hit_limit(n)

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

    def prompt_blocks_of(self, n: torch.Tensor) -> torch.Tensor:
        """``prompt_blocks`` for a batch."""
        if not self.recent:
            return n // self.block_size
        return (n // self.block_size - self.recent // self.block_size).clamp_(min=0)

    def _prompt_gap(self, n: torch.Tensor) -> torch.Tensor:
        size = self.prompt_blocks_of(n)
        # size - ceil(keep * size) = floor((1 - keep) * size): one operation less.
        freed = size * (self.keep.denominator - self.keep.numerator) // self.keep.denominator
        if self.min_blocks > 1:
            freed = torch.minimum(freed, (size - self.min_blocks).clamp_(min=0))
        return freed.mul_(n >= self.min_prompt) if self.min_prompt else freed

    def _windows_batch(self, n: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        size = self.window // self.block_size
        if self.kept(size) == size:  # also without windows
            return torch.zeros_like(n)
        boundary = (n + (self.block_size - 1)) // self.block_size * self.block_size + self.recent
        return (c - boundary).clamp_(min=0).div_(self.window, rounding_mode="floor").mul_(n > 0)

    def window_ends(self, n: torch.Tensor, c: torch.Tensor, q: torch.Tensor) -> bool:
        """Whether some request may complete a decode window in the step ``[c, c + q)``.

        True also when a request reaches its first window. For tensors on the CPU.
        """
        if not self.window:
            return False
        n, c, q = n.numpy(), c.numpy(), q.numpy()  # a third of torch's time for a few numbers
        since = c - -(-n // self.block_size) * self.block_size - self.recent
        return bool(((since + q) // self.window > since // self.window).any())

    def moves(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        width: int,
        opted_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns that are live at c, int64 [R, width], and the freed tokens, int64 [R].

        Columns past a row's last live one repeat column ``width - 1``. The same for as long as no
        segment ends. No host synchronisation, no loop.
        """
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
        row = torch.repeat_interleave(count)
        first = (count.cumsum(0) - count)[row]
        # Index among the row's segments of this step; the prompt, where it ends, comes first.
        index = torch.arange(len(row), device=n.device) - first - prompt_ends[row]
        is_prompt = index < 0
        size = self.window // self.block_size
        prompt = self.prompt_blocks_of(n[row])
        blocks = (n[row] + (self.block_size - 1)) // self.block_size
        stop = torch.where(is_prompt, prompt, blocks + (before[row] + index + 1) * size)
        return SegmentBatch(
            row=row,
            start=torch.where(is_prompt, 0, stop - size),
            stop=stop,
            kept=torch.where(is_prompt, prompt - gap_after[row], self.kept(size)),
            ends=torch.where(is_prompt, n[row], stop * self.block_size + self.recent),
        )
