# SPDX-License-Identifier: Apache-2.0
"""The layout of a budget: however long a request grows, a fixed number of its blocks stays live.

N prompt tokens, bs = block_size, nfull = N // bs, w = window // bs, b = budget // bs. Column nfull
is the tail: it holds the end of the prompt and the first generated tokens. Windows are counted from
the column behind it, so that they depend on the full blocks of the prompt only. The area that a
budget governs holds kept tokens, always in one piece. When a window ends, the area and the window
are compacted together into the last columns of both, so the area moves into the blocks of generated
tokens. With b = 8 and w = 2, a long prompt (nfull = 12) and a short one (nfull = 3)::

    column          0 1 2 3 4 5 6 7 8 9 10 11 | 12   | 13 14 | 15 16 | 17 18 | 19 ..
    at N            - - - - K K K K K K  K  K | tail |
    window 0 ends   - - - - - - - K K K  K  K | K    |  K  K |
    window 1 ends   - - - - - - - - - K  K  K | K    |  K  K |  K  K | raw ..

    column          0 1 2 | 3    | 4 5 | 6 7 | 8 9 | 10 11 ..
    window 1 ends   r r r | tail | r r | r r | raw ..         4 live columns of the area, 4 allowed
    window 2 ends   r r r | tail | - - | K K | K K | raw ..

- A long prompt is compacted to b columns when it ends. Its tail joins the area.
- A short prompt, one that leaves room for two windows beside it and its tail, stays raw for good,
  tail included. The area begins behind it and has the rest of the budget. So a prefix-cache hit may
  cover the whole prompt.
- A prompt in between is not compacted when it ends, but it is part of the area. The first window
  that does not fit overwrites some of it, which caps prefix-cache hits early in the prompt.

Between two steps a request has at most b + w live columns and the one that is being filled. A
prompt has all of its columns while it is computed, unless there is a prompt window: then the first
``prompt_window`` tokens of a longer prompt are compacted as a prompt of that length, and those
behind them like generated ones, in decode windows. It is the same function with N cut to
``prompt_window``. So the memory of a prompt is bounded too, and its later tokens see what is left
of the earlier ones.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from compress_common.errors import joined
from kv_policies.layout.base import Amount, Layout
from kv_policies.layout.segments import IntArray, Ints, lesser, positive


@dataclass(frozen=True)
class BoundedLayout(Layout):
    """The layout of the layers that share one budget of tokens: see the module's text.

    Attributes:
        block_size: Tokens per block, at least 2.
        budget: Tokens that stay live per request and layer, a multiple of block_size, at least two
            windows. Smaller: less memory, more loss.
        window: Generated tokens per decode window, a multiple of block_size. Smaller: memory is
            given back earlier, and tokens are chosen more often.
        prompt_window: Longer prompts are compacted while they are computed, from this many tokens
            on, more than the budget and a multiple of block_size. Smaller: less memory, and less of
            the prompt is computed without loss. 0: prompts are computed whole.
    """

    block_size: int
    budget: int
    window: int
    min_prompt: int = 0
    prompt_window: int = 0

    def __post_init__(self) -> None:
        problems = self._not_whole_blocks("budget", "window", "prompt_window")
        if 0 < self.prompt_window <= self.budget:
            problems.append(
                f"a prompt window of {self.prompt_window} tokens is not more than the budget of "
                f"{self.budget}"
            )
        if self.window < 1:
            problems.append("window must not be 0: a budget bounds generated tokens too")
        elif self.budget < 2 * self.window:
            problems.append(
                f"a budget of {self.budget} tokens is less than two decode windows of {self.window}"
            )
        if self.min_prompt:
            problems.append("min_prompt has no use beside a budget: shorter prompts stay whole")
        if problems:
            raise joined(problems)

    def head(self, n: Ints) -> Ints:
        return lesser(n, 0 * n + self.prompt_window) if self.prompt_window else n

    def most_columns(self, longest: int, in_flight: int) -> int:
        whole = super().most_columns(longest, in_flight)
        if not self.prompt_window:
            return whole
        settled = max(self.prompt_window, self.most_tokens)
        return min(whole, -(-(settled + in_flight) // self.block_size) + 1)

    @property
    def share(self) -> Fraction:
        return Fraction(0)

    def share_of(self, tokens: int) -> Fraction:
        return Fraction(min(self.budget, tokens), tokens)

    @property
    def compacted_from(self) -> int:
        return self.budget + self.block_size

    @property
    def amount(self) -> Fraction:
        return Fraction(self.budget)

    @property
    def most_tokens(self) -> int:
        """Tokens of the blocks that a request has at most between two steps, while it generates."""
        return self.budget + self.window + self.block_size

    def __str__(self) -> str:
        cut = f", prompt window {self.prompt_window:,}" if self.prompt_window else ""
        return f"budget {self.budget:,} tokens{cut}"

    @cached_property
    def timing(self) -> tuple[object, ...]:
        # The area of another budget is another segment.
        return BoundedLayout, self.block_size, self.budget, self.window

    @property
    def compacts_windows(self) -> bool:
        return True

    def asked(self, amount: Amount) -> "BoundedLayout":
        """It can overwrite columns of a prompt that this layout leaves alone. So the request must
        not start from a prefix-cache hit.
        """
        if not isinstance(amount, int) or amount > self.budget:
            raise ValueError(f"a request asked for {amount} tokens, the budget is {self.budget}")
        return replace(self, budget=-(-amount // self.block_size) * self.block_size)

    def prompt(self, n: Ints) -> Ints:
        full = n // self.block_size
        return full * (full > self._blocks)

    def windows(self, n: Ints, c: Ints) -> Ints:
        return positive(c - self._behind(n) * self.block_size) // self.window * (n > 0)

    def window_at(self, n: Ints, index: Ints) -> tuple[Ints, Ints, Ints]:
        stop = self._behind(n) + (index + 1) * self._window
        return stop - self._window - self._live(n, index), stop, stop * self.block_size

    def stays(self, n: Ints, start: Ints, stop: Ints) -> Ints:
        return lesser(stop - start, self._blocks - self._whole(n))

    def first_destination(self, n: int) -> int | None:
        if self.prompt(n):
            return self.prompt(n) - self._blocks
        allowed = self._blocks - self._whole(n)
        fits = max(0, (allowed - self._live(n, 0)) // self._window)  # windows before the first
        return self.window_at(n, fits)[1] - allowed

    def hidden(self, phase: IntArray) -> IntArray:
        n, windows = phase
        columns = self._behind(n) + windows * self._window
        hidden: IntArray = (columns - self._whole(n) - self._live(n, windows)) * self.block_size
        return hidden

    def columns(self, phase: IntArray, hidden: IntArray, width: int) -> IntArray:
        whole, gap = (x[:, None] for x in (self._whole(phase[0]), hidden // self.block_size))
        at = np.arange(width)
        columns: IntArray = at + gap * (at >= whole)
        return columns

    def _behind(self, n: Ints) -> Ints:
        """The first column behind the tail of a prompt."""
        return n // self.block_size + 1

    def _whole(self, n: Ints) -> Ints:
        """Columns of a prompt that stays raw, its tail included; 0 where it is part of the area."""
        columns = self._behind(n)
        return columns * (columns + 2 * self._window <= self._blocks)

    def _live(self, n: Ints, windows: Ints) -> Ints:
        """Columns of the area once a prompt and so many windows are complete."""
        columns = self._behind(n)
        prompt = lesser(columns, 0 * columns + self._blocks + 1) * (self._whole(n) == 0)
        grown = prompt + windows * self._window
        allowed = self._blocks - self._whole(n)
        # The tail of a long prompt exceeds the budget until the first window ends.
        return lesser(grown, allowed) * (windows > 0) + prompt * (windows == 0)

    @cached_property
    def _blocks(self) -> int:
        return self.budget // self.block_size

    @cached_property
    def _window(self) -> int:
        return self.window // self.block_size
