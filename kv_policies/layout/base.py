# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request are live: pure functions, called by scheduler and worker alike.

A request's logical block list has columns 0, 1, 2, ...; column j holds the KV of token positions
``[j * bs, (j + 1) * bs)`` when they are written. The columns are cut into *segments*. When a
segment is complete, its content is rewritten into fewer columns and the others are freed. What is
rewritten and where is told by the two kinds of layout: ``TokenLayout``, chosen tokens, and
``LatentLayout``, latents of all tokens.

Everything is a function of (N, c), N being the tokens of the prompt and c the tokens computed
before a step. Nothing depends on how the tokens were cut into steps, so both sides agree after
chunked prefill, preemption and resume without telling each other anything.

What the engine does in a step that computes tokens ``[c, c + q)``:

1. Write K/V of the new tokens at their positions, as always.
2. Attend to what is live at c: segments complete *at c* are compacted in it, those that complete
   during this step are still raw.
3. Compact each segment of ``ending(n, c, q)``: those with ``c < complete at <= c + q``. They hold
   raw content for certain: no earlier step since the request (re)started compacted them, and their
   tokens were all computed since, or hit in the cache in front of the destination.
4. Free ``freed(n, processed)`` on the scheduler's side once a step has settled, ``processed`` being
   the computed tokens less those in flight. Steps in flight never read these columns: their c is
   already past the segment.

A fresh request never computes past N in the step that ends its prompt, and completes a window of
generated tokens with the last token of a step. Only a *resumed* request, whose prompt and generated
tokens are recomputed as one prefill, has steps that cross N or several windows. Two rules make it
well defined:

- It restarts at most at ``first_destination(n)`` columns (a prefix-cache hit capped there, or 0):
  from that column on its blocks are its own and raw until compacted again. The N of this is the
  prompt length, never prompt plus generated tokens.
- Its step is run as the ``substeps(n, c, q)``, in order, inside each layer's attention: attend,
  compact, attend to what is left, and so on. Then each token sees exactly what it saw before the
  preemption. (Attending once with c's view and compacting all ending segments afterwards is
  consistent too, but lets recomputed tokens see more than they did, so texts can change.)

Limits: where windows are compacted no speculative tokens, as a rejected draft could take back the
end of a window that is already compacted (the prompt's end is never taken back, so ``window`` 0
allows them). N must not grow (streaming input). Positions shared over ranks (DCP, PCP) are not
described.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple, Self

import torch


def runs(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of int64 [R] counts: the row of each thing counted, and its number in the row from 0."""
    row = torch.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[row]
    return row, torch.arange(len(row), device=counts.device) - first


class Segment(NamedTuple):
    """Columns ``[start, stop)``, compacted once ``ends`` tokens are there; the last ``kept`` stay.

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
        """The columns that stay, as a half-open range."""
        return self.stop - self.kept, self.stop


class Layout(ABC):
    """The layout of the layers that share one block table: see the module's text.

    block_size: tokens per block. window: generated tokens per decode window, a multiple of
    block_size; 0: generated tokens are never compacted. min_prompt: prompts of fewer tokens are not
    compacted (their decode windows are), a multiple of block_size, so that a prompt's full blocks,
    all that a cache lookup knows of it, tell.
    """

    block_size: int
    window: int
    min_prompt: int

    @property
    @abstractmethod
    def share(self) -> Fraction:
        """Blocks per block that is compacted, in (0, 1], rounding aside."""

    @property
    @abstractmethod
    def timing(self) -> tuple[object, ...]:
        """Layouts of one timing end their windows in the same steps."""

    @abstractmethod
    def opted_out(self) -> Self:
        """The layout of a request that keeps everything: ``opted_out`` in the batched functions."""

    def _not_whole_blocks(self, *names: str) -> list[str]:
        """What is wrong with the block size, and with fields that must be multiples of it."""
        size = self.block_size
        problems = []
        if size < 2:
            problems.append(f"block_size must be at least 2 tokens, got {size}")
        for name in names:
            tokens = getattr(self, name)
            if tokens < 0 or (size >= 2 and tokens % size):
                problems.append(
                    f"{name} must be 0 or a multiple of the block size {size}, got {tokens}"
                )
        return problems

    # -- one request: the scheduler's side -------------------------------------------------------

    @abstractmethod
    def gap(self, n: int) -> int:
        """Blocks that the prompt segment of N = n tokens frees, once: columns ``[0, gap)``."""

    @abstractmethod
    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        """Segments that are compacted and end in ``after < ends <= c``, in order of ``ends``."""

    @abstractmethod
    def first_destination(self, n: int) -> int | None:
        """First column that is ever overwritten by a compaction; None when there is none.

        The columns before it hold the exact, uncompressed KV of their tokens for as long as the
        request lives, and remain so after they are freed. So they, and only they, may be shared:
        see ``cacheable`` and ``hit_limit``.
        """

    def freed(self, n: int, c: int, after: int = 0) -> list[tuple[int, int]]:
        """Column ranges ``[first, stop)`` that are free at c and were not yet at ``after``."""
        ranges = (segment.freed for segment in self.segments(n, c, after))
        return [(first, stop) for first, stop in ranges if first < stop]

    def ending(self, n: int, c: int, q: int) -> list[Segment]:
        """Segments to compact at the end of the step that computes tokens ``[c, c + q)``."""
        return list(self.segments(n, c + q, after=c))

    def substeps(self, n: int, c: int, q: int) -> list[tuple[int, int]]:
        """The step ``[c, c + q)`` cut after each segment that ends in it: [(c, q), ...].

        One element, the step itself, unless a resumed request recomputes past a segment's end.
        """
        cuts = [segment.ends for segment in self.ending(n, c, q)]
        if not cuts or cuts[-1] != c + q:
            cuts.append(c + q)
        return [(a, b - a) for a, b in zip([c, *cuts], cuts, strict=False)]

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

    # -- a batch of R requests: the worker's side --------------------------------------------------
    #
    # n, c, q: int [R], prompt length, computed tokens and new tokens per request; n = 0 is a
    # padding row. opted_out: bool [R], requests that keep everything.

    @abstractmethod
    def window_ends(self, n: torch.Tensor, c: torch.Tensor, q: torch.Tensor) -> bool:
        """Whether some request may complete a decode window in the step ``[c, c + q)``.

        True also when a request reaches its first window. For tensors on the CPU.
        """

    @abstractmethod
    def is_cut(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        q: torch.Tensor,
        opted_out: torch.Tensor | None = None,
    ) -> bool:
        """Whether some request has more than one of ``substeps``. For tensors on the CPU."""

    @abstractmethod
    def moves(
        self,
        n: torch.Tensor,
        c: torch.Tensor,
        width: int,
        opted_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns that the kernel reads at c, int64 [R, width], and the tokens that it does not
        see, int64 [R].

        What lies behind a row's last column is any column. The same for as long as no segment ends.
        No host synchronisation, no loop.
        """
