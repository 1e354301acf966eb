# SPDX-License-Identifier: Apache-2.0
"""The layout of chosen tokens: the last columns of a segment hold the tokens that it keeps.

N prompt tokens, bs = block_size, nfull = N // bs, w = window // bs, keep = 1/4::

    column      0  1  2  3  4  5  6  7 | 8    | 9 10 11 12 | 13 14 15 16 | 17 18 ..
    segment     prompt (nfull = 8)     | tail | window 0   | window 1    | not complete
    complete at N                      | -    | 13 * bs    | 17 * bs     |
    live        -  -  -  -  -  - K0 K1 | raw  | -  -  - K  | -  -  -  K  | raw raw ..

- The prompt segment is columns ``[0, nfull)``, complete when N tokens are computed.
- The tail is the block that holds the end of the prompt and the first generated tokens. It always
  stays raw. There is none when bs divides N.
- Decode window i is columns ``[d + i * w, d + (i + 1) * w)`` with ``d = ceil(N / bs)``. Windows are
  counted from the first block boundary at or after N, so each is whole blocks. A window is complete
  when its last token is computed.
- Of the ``size`` columns of a segment the last ``min(size, max(min_blocks, ceil(keep * size)))``
  stay, in exact integer arithmetic. A segment that would keep all its columns is not compacted.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from compress_common.errors import joined
from kv_policies.layout.base import Amount, Layout
from kv_policies.layout.segments import IntArray, Ints, lesser, positive

# Keeps num * columns inside int64 for any realistic prompt.
_MAX_DENOMINATOR = 10**9


@dataclass(frozen=True)
class TokenLayout(Layout):
    """The layout of the layers that share one keep level: see the module's text.

    Attributes:
        block_size: Tokens per block, at least 2: a kept block must hold a segment's first token and
            its last.
        keep: Exact share of a segment's blocks that stays, in (0, 1]. Smaller: less memory, more
            loss.
        window: Generated tokens per decode window, a multiple of block_size. Smaller: memory is
            given back earlier, and each choice sees less. 0: generated tokens are never compacted.
        min_blocks: Blocks that a compacted segment keeps at least. Larger: short prompts lose less.
        min_prompt: See ``Layout``.
        served: Share of the layers, where ``keep`` is what a request asked for; None where it asked
            for nothing. Segments that the layers keep whole stay whole: see ``Layout.asked``.
    """

    block_size: int
    keep: Fraction
    window: int = 0
    min_blocks: int = 1
    min_prompt: int = 0
    served: Fraction | None = None

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

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # That of a fraction is slow, and a step looks up each layout several times.
        fields = self.block_size, self.keep, self.window, self.min_blocks, self.min_prompt
        return hash((*fields, self.served))

    def asked(self, amount: Amount) -> "TokenLayout":
        """It compacts the same segments into fewer columns. So it overwrites no column that this
        layout does not, and hits that are safe under this layout are safe under that one.
        """
        if not isinstance(amount, Fraction) or amount > self.keep:
            raise ValueError(f"a request asked for {amount}, of layers that keep {self.keep}")
        return replace(self, keep=amount, served=self.keep)

    @property
    def share(self) -> Fraction:
        return self.keep

    @cached_property
    def timing(self) -> tuple[object, ...]:
        window = self.window if self.compacts_windows else 0
        return TokenLayout, self.block_size, self.min_prompt, window

    @cached_property
    def compacts_windows(self) -> bool:
        return self._window_freed > 0

    def kept(self, size: Ints) -> Ints:
        """Blocks that stay of a segment of ``size`` blocks."""
        # floor((1 - keep) * size) are freed: one operation less than ceil(keep * size).
        part, whole = self._freed_share
        freed = size * part // whole
        if self.served is not None:
            part, whole = self._served_freed_share
            freed = freed * (size * part // whole > 0)
        return size - lesser(freed, positive(size - self.min_blocks))

    @cached_property
    def _freed_share(self) -> tuple[int, int]:
        return (1 - self.keep).as_integer_ratio()

    @cached_property
    def _served_freed_share(self) -> tuple[int, int]:
        assert self.served is not None
        return (1 - self.served).as_integer_ratio()

    def prompt(self, n: Ints) -> Ints:
        return n // self.block_size * (n >= self.min_prompt)

    def windows(self, n: Ints, c: Ints) -> Ints:
        if not self.compacts_windows:
            return 0 * n
        boundary = -(-n // self.block_size) * self.block_size
        return positive(c - boundary) // self.window * (n > 0)

    def window_at(self, n: Ints, index: Ints) -> tuple[Ints, Ints, Ints]:
        stop = -(-n // self.block_size) + (index + 1) * self._window_size
        return stop - self._window_size, stop, stop * self.block_size

    def stays(self, n: Ints, start: Ints, stop: Ints) -> Ints:
        return self.kept(stop - start)

    def hidden(self, phase: IntArray) -> IntArray:
        n, windows = phase
        hidden: IntArray = (self.gap(n) + windows * self._window_freed) * self.block_size
        return hidden

    def columns(self, phase: IntArray, hidden: IntArray, width: int) -> IntArray:
        n, windows = phase
        gap = (hidden // self.block_size - windows * self._window_freed)[:, None]
        at = np.arange(width)
        columns: IntArray = at + gap
        if self.compacts_windows:
            head = -(-n // self.block_size)[:, None] - gap  # live columns before the first window
            # Before the live column `at`, `ahead` windows have given their columns away.
            ahead = positive((at - head) // (self._window_size - self._window_freed) + 1)
            columns += np.minimum(ahead, windows[:, None]) * self._window_freed
        return columns

    @cached_property
    def _window_size(self) -> int:
        """Columns of a decode window."""
        return self.window // self.block_size

    @cached_property
    def _window_freed(self) -> int:
        """Columns that a decode window frees."""
        return self._window_size - self.kept(self._window_size)
