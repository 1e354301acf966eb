# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request are live: pure functions that scheduler and worker both call.

A request's logical block list has columns 0, 1, 2, ...; column j holds the KV of the token
positions ``[j * bs, (j + 1) * bs)``. The columns are cut into *segments*. When a segment is
complete, its content is rewritten into fewer columns and the others are freed. There are three
kinds of layout: ``TokenLayout`` keeps a share of the tokens, ``BoundedLayout`` a fixed number of
them, and ``LatentLayout`` latents of all tokens.

Everything is a function of (N, c): N is the number of prompt tokens (``Layout.head`` of them), c
the number of tokens computed before a step. It does not matter how the tokens were cut into steps.
So both sides agree after chunked prefill, preemption and resume, and exchange no messages.

In a step that computes tokens ``[c, c + q)`` the engine does this:

1. It writes K/V of the new tokens at their positions, as always.
2. It attends to what is live at c. Segments that were complete *at c* are compacted there.
   Segments that complete during this step are still raw.
3. It compacts each segment of ``segments(n, c + q, after=c)``, in order. Their content is known for
   certain: tokens that were computed since the request (re)started, or found in the cache in front
   of the destination, or what an earlier segment of the same request kept (``BoundedLayout``).
4. The scheduler frees ``freed(n, processed)`` once a step has settled. ``processed`` is the
   computed tokens without those in flight. Steps in flight never read these columns, because their
   c is past the segment already.

A fresh request does not compute past N in the step that ends its prompt, and completes a window of
generated tokens with the last token of a step. A *resumed* request recomputes its prompt and its
generated tokens as one prefill, so its steps can cross N or several windows; those of a prompt that
is longer than its ``head`` do so too. Two rules apply:

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
from functools import lru_cache

import numpy as np

from kv_policies.layout.segments import Ending, IntArray, Ints, Segment, runs

Amount = Fraction | int  # what a request asks for: a share of its blocks, or tokens


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
        """Blocks that stay per block of a long prompt, in [0, 1], without rounding.

        0: what stays does not grow with the prompt. 1: nothing is ever compacted.
        """

    def head(self, n: Ints) -> Ints:
        """Tokens of a prompt of ``n`` that are compacted as a prompt: N of all other methods.

        What lies behind them is treated like generated tokens, so that it is compacted while the
        prompt is computed. Without such a limit it is all of the prompt.
        """
        return n

    def most_columns(self, longest: int, in_flight: int) -> int:
        """Columns that a request takes at most, while its prompt is computed and later.

        Args:
            longest: Its tokens.
            in_flight: Computed tokens of steps that have not settled.
        """
        return -(-longest // self.block_size)

    def share_of(self, tokens: int) -> Fraction:
        """Blocks that stay per block of a prompt of so many tokens, without rounding."""
        return self.share

    @property
    def compacted_from(self) -> int:
        """Tokens of the shortest prompt that can be compacted when it ends."""
        return self.min_prompt

    @property
    def amount(self) -> Fraction:
        """What sorts the layouts of one engine by how much they keep."""
        return self.share

    def __str__(self) -> str:
        """What a layer of this layout keeps, for a log."""
        return f"keep {float(self.share):.3f}"

    def asked(self, amount: Amount) -> "Layout":
        """The layout of a request that asked for less than these layers keep.

        Its ``phase`` is that of this layout.

        Args:
            amount: What ``amount`` of the layout is to be.

        Raises:
            ValueError: It is more than ``self.amount``, or there is no such layout.
        """
        raise ValueError(f"{type(self).__name__} has no other amounts")

    def for_request(self, amount: Amount | None) -> "Layout":
        """The layout of a request that asked for an amount, or for nothing.

        It is this layout where there is no such amount. A request is checked before it gets here,
        but by what the engine serves that this process configured last.
        """
        return self if amount is None else _asked(self, amount)

    @property
    @abstractmethod
    def timing(self) -> tuple[object, ...]:
        """Layouts of equal timing cut requests into the same segments, and keep other shares."""

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
    def prompt(self, n: Ints) -> Ints:
        """Columns of the prompt's segment, from column 0 on; 0 where it is never compacted."""

    @abstractmethod
    def windows(self, n: Ints, c: Ints) -> Ints:
        """Decode windows that are complete when c tokens are computed, and are compacted."""

    @abstractmethod
    def window_at(self, n: Ints, index: Ints) -> tuple[Ints, Ints, Ints]:
        """Start, stop and ends of decode window ``index``: see ``Segment``."""

    @abstractmethod
    def stays(self, n: Ints, start: Ints, stop: Ints) -> Ints:
        """Columns that stay of the segment ``[start, stop)``."""

    def compacts(self, size: int, stays: int) -> bool:
        """Whether a segment of which ``stays`` of ``size`` columns stay is rewritten."""
        return stays < size

    @abstractmethod
    def hidden(self, phase: IntArray) -> IntArray:
        """Computed tokens that the kernel does not see in the live columns, int64 [R]."""

    @abstractmethod
    def columns(self, phase: IntArray, hidden: IntArray, width: int) -> IntArray:
        """The columns that the kernel reads, int64 [R, width]: the live ones in order.

        Args:
            phase: As ``phase`` returns it.
            hidden: As ``hidden`` returns it for this phase.
            width: Columns to return. What lies behind the last live column of a row is any column.
        """

    # -- what follows from it: one request, the scheduler's side ---------------------------------

    def gap(self, n: Ints) -> Ints:
        """Blocks that the prompt segment of N = n tokens frees: columns ``[0, gap)``."""
        stop = self.prompt(n)
        return stop - self.stays(n, 0 * n, stop)

    def segments(self, n: int, c: int, after: int = 0) -> Iterator[Segment]:
        """Segments that are compacted and end in ``after < ends <= c``, in order of ``ends``."""
        found = [(0, self.prompt(n), n)] if after < n <= c else []
        found += [self.window_at(n, at) for at in range(self.windows(n, after), self.windows(n, c))]
        for start, stop, ends in found:
            stays = self.stays(n, start, stop)
            if self.compacts(stop - start, stays):
                yield Segment(start, stop, stays, ends)

    def first_destination(self, n: int) -> int | None:
        """First column that is ever overwritten by a compaction; None when there is none.

        The columns before it hold the exact, uncompressed KV of their tokens for as long as the
        request lives, and remain so after they are freed. So they, and only they, may be shared:
        see ``cacheable`` and ``hit_limit``.
        """
        segments = [(0, self.prompt(n))]
        if self.compacts_windows:
            segments.append(self.window_at(n, 0)[:2])
        for start, stop in segments:
            stays = self.stays(n, start, stop)
            if self.compacts(stop - start, stays):
                return stop - stays
        return None

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

    def ending(self, n: IntArray, c: IntArray, q: IntArray) -> dict[str, Ending]:
        """What ends in the step that computes tokens ``[c, c + q)``: of a "prompt", of a "window".

        A kind of which nothing ends is not there. It is the same for layouts of one timing. Some of
        them may not compact it: see ``compacts``.

        Args:
            n: Prompt length per request, int64 [R].
            c: Computed tokens before the step, int64 [R].
            q: Tokens of the step, int64 [R].
        """
        found = {}
        row = ((c < n) & (n <= c + q)).nonzero()[0]
        if len(row) and (stop := self.prompt(n[row])).any():
            prompts = Ending(row, n[row], 0 * row, stop, n[row])
            found["prompt"] = prompts if stop.all() else prompts.some(stop > 0)
        before = self.windows(n, c)
        count = self.windows(n, c + q) - before
        if count.any():
            row, index = runs(count)
            found["window"] = Ending(row, n[row], *self.window_at(n[row], before[row] + index))
        return found


@lru_cache(1024)
def _asked(layout: Layout, amount: Amount) -> Layout:
    try:
        return layout.asked(amount)
    except ValueError:
        return layout
