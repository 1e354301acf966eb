# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request are live: pure functions that scheduler and worker both call.

A request's logical block list has columns 0, 1, 2, ...; column j holds the KV of the token
positions ``[j * bs, (j + 1) * bs)``. The columns are cut into *segments*. When a segment is
complete, its content is rewritten into fewer columns and the others are freed. There are two kinds
of layout: ``TokenLayout`` keeps chosen tokens, ``LatentLayout`` keeps latents of all tokens.

Everything is a function of (N, c): N is the number of prompt tokens, c the number of tokens
computed before a step. It does not matter how the tokens were cut into steps. So both sides agree
after chunked prefill, preemption and resume, and exchange no messages.

In a step that computes tokens ``[c, c + q)`` the engine does this:

1. It writes K/V of the new tokens at their positions, as always.
2. It attends to what is live at c. Segments that were complete *at c* are compacted there.
   Segments that complete during this step are still raw.
3. It compacts each segment of ``segments(n, c + q, after=c)``. These are raw for certain: no step
   since the request (re)started has compacted them, and their tokens were all computed since then,
   or were found in the cache in front of the destination.
4. The scheduler frees ``freed(n, processed)`` once a step has settled. ``processed`` is the
   computed tokens without those in flight. Steps in flight never read these columns, because their
   c is past the segment already.

A fresh request does not compute past N in the step that ends its prompt, and completes a window of
generated tokens with the last token of a step. A *resumed* request recomputes its prompt and its
generated tokens as one prefill, so its steps can cross N or several windows. Two rules apply:

- It restarts at most at ``first_destination(n)`` columns: after a prefix-cache hit capped there,
  or at 0. From that column on its blocks are its own, and raw until they are compacted again. N
  stays the length of the prompt, without generated tokens.
- Its step is run as ``substeps(n, c, q)``, in order, inside each layer's attention: attend,
  compact, attend to what is left, and so on. So each token sees exactly what it saw before the
  preemption.

Limits: Where windows are compacted there can be no speculative tokens, because a rejected draft
could take back the end of a compacted window (``window`` 0 allows them: the prompt's end is never
taken back). N must not grow, as with streaming input. Positions that are spread over ranks (DCP,
PCP) are not described.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
# A number of one request (the scheduler), or one number per request (the worker).
Ints = TypeVar("Ints", int, IntArray)


def positive(x: Ints) -> Ints:
    """``max(x, 0)``."""
    return x * (x > 0)


def lesser(a: Ints, b: Ints) -> Ints:
    """``min(a, b)``."""
    return b + (a - b) * (a < b)


def runs(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Number the things that rows count: the row of each thing, and its index in that row.

    Args:
        counts: Things per row, [R].

    Returns:
        Row and index of each thing, [counts.sum()] each, in order of the rows.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    first = (counts.cumsum() - counts)[row]
    return row, np.arange(len(row)) - first


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


class Segments(NamedTuple):
    """Segments of several requests, [S] each: see ``Segment``. Ordered by row, then by ``ends``.

    ``row`` is the request's row in the batch. A row occurs more than once only in the step of a
    resumed request. ``is_prompt`` tells prompts from decode windows.
    """

    row: IntArray
    start: IntArray
    stop: IntArray
    kept: IntArray
    ends: IntArray
    is_prompt: npt.NDArray[np.bool_]

    def some(self, which: npt.NDArray[np.bool_] | slice) -> "Segments":
        """Some of the segments, by bool [S] or as a slice."""
        return Segments._make(field[which] for field in self)


class Layout(ABC):
    """The layout of the layers that share one block table: see the module's text.

    The arithmetic of a layout is written once. Its methods take an ``int`` per argument for one
    request, as the scheduler calls them, or an int64 array [R] for R requests, as the worker does.
    A row of n = 0 keeps everything: a row that pads the batch, or a request that opted out.

    Attributes:
        block_size: Tokens per block.
        window: Generated tokens per decode window, a multiple of block_size; 0: generated tokens
            are never compacted.
        min_prompt: Prompts of fewer tokens are not compacted (their decode windows are). A multiple
            of block_size, so that the full blocks of a prompt, which are all that a cache lookup
            knows, tell whether it is compacted.
    """

    block_size: int
    window: int
    min_prompt: int

    @property
    @abstractmethod
    def share(self) -> Fraction:
        """Blocks that stay per block that is compacted, in (0, 1], without rounding."""

    @property
    @abstractmethod
    def timing(self) -> tuple[object, ...]:
        """Layouts of equal timing end their decode windows in the same steps."""

    @property
    @abstractmethod
    def compacts_windows(self) -> bool:
        """Whether the end of a decode window changes anything."""

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

    # -- what a kind of layout has to say --------------------------------------------------------

    @abstractmethod
    def prompt(self, n: Ints) -> tuple[Ints, Ints]:
        """The prompt's segment.

        Args:
            n: Tokens of the prompt.

        Returns:
            Its columns, counted from column 0, and how many of them stay; 0 and 0 where the prompt
            is not compacted.
        """

    @abstractmethod
    def windows(self, n: Ints, c: Ints) -> Ints:
        """Decode windows that are complete when c tokens are computed, and are compacted."""

    @abstractmethod
    def window_segment(self, n: Ints, index: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Start, stop, kept and ends of decode window ``index``: see ``Segment``."""

    @abstractmethod
    def columns(self, phase: IntArray, width: int) -> IntArray:
        """The columns that the kernel reads, int64 [R, width]: the live ones in order.

        Args:
            phase: As ``phase`` returns it.
            width: Columns to return. What lies behind the last live column of a row is any column.
        """

    @abstractmethod
    def hidden(self, phase: IntArray) -> IntArray:
        """Computed tokens that the kernel does not see in the live columns, int64 [R]."""

    # -- what follows from it: one request, the scheduler's side ---------------------------------

    def gap(self, n: Ints) -> Ints:
        """Blocks that the prompt segment of N = n tokens frees: columns ``[0, gap)``."""
        stop, kept = self.prompt(n)
        return stop - kept

    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        """Segments that are compacted and end in ``after < ends <= c``, in order of ``ends``."""
        if after < n <= c:
            stop, kept = self.prompt(n)
            if stop:
                yield Segment(0, stop, kept, n)
        for index in range(self.windows(n, after), self.windows(n, c)):
            yield Segment(*self.window_segment(n, index))

    def first_destination(self, n: int) -> int | None:
        """First column that is ever overwritten by a compaction; None when there is none.

        The columns before it hold the exact, uncompressed KV of their tokens for as long as the
        request lives, and remain so after they are freed. So they, and only they, may be shared:
        see ``cacheable`` and ``hit_limit``.
        """
        stop, kept = self.prompt(n)
        if not stop and self.compacts_windows:
            _, stop, kept, _ = self.window_segment(n, 0)
        return stop - kept if stop else None

    def freed(self, n: int, c: int, after: int = 0) -> list[tuple[int, int]]:
        """Column ranges ``[first, stop)`` that are free at c and were not yet at ``after``."""
        ranges = (segment.freed for segment in self.segments(n, c, after))
        return [(first, stop) for first, stop in ranges if first < stop]

    def substeps(self, n: int, c: int, q: int) -> list[tuple[int, int]]:
        """The step ``[c, c + q)`` cut after each segment that ends in it: [(c, q), ...].

        One element, the step itself, unless a resumed request recomputes past a segment's end.
        """
        cuts = [segment.ends for segment in self.segments(n, c + q, after=c)]
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

    # -- and of R requests: the worker's side -----------------------------------------------------

    def phase(self, n: IntArray, c: IntArray) -> IntArray:
        """What decides which columns are live at c: the same for layouts of one timing.

        Returns:
            int64 [2, R]: the prompt's length, 0 until it is complete, and the complete windows.
        """
        return np.stack((n * (c >= n), self.windows(n, c)))

    def ending(self, n: IntArray, c: IntArray, q: IntArray) -> Segments:
        """Segments to compact at the end of the step that computes tokens ``[c, c + q)``.

        Args:
            n: Prompt length per request, int64 [R].
            c: Computed tokens before the step, int64 [R].
            q: Tokens of the step, int64 [R].
        """
        before, after = self.windows(n, c), self.windows(n, c + q)
        stop, kept = self.prompt(n)
        prompt_ends = (c < n) & (n <= c + q) & (stop > 0)
        row, index = runs(prompt_ends + after - before)
        index -= prompt_ends[row]  # the prompt, where it ends, comes first
        is_prompt = index < 0
        of_prompt = np.zeros_like(row), stop[row], kept[row], n[row]
        of_window = self.window_segment(n[row], before[row] + index)
        fields = (np.where(is_prompt, a, b) for a, b in zip(of_prompt, of_window, strict=True))
        return Segments._make((row, *fields, is_prompt))
