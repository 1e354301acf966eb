# SPDX-License-Identifier: Apache-2.0
"""One request's tokens while they are denoised: prompt, committed tokens and masks."""

from collections.abc import Collection, Sequence

import numpy as np


class Canvas:
    """``length`` masks behind a prompt, committed in any order and released from the left.

    tokens: int64 [N], N = prompt + length. masked: bool [N]. limit: positions from here on are no
    longer wanted, as a stop token was committed before; they hold ``fill``.

    stops: tokens that end the text, at the first place where one is committed.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        length: int,
        mask: int,
        stops: Collection[int] = (),
        fill: int | None = None,
    ) -> None:
        self.prompt, self.mask = len(prompt), mask
        self.tokens = np.full(len(prompt) + length, mask, dtype=np.int64)
        self.tokens[: len(prompt)] = prompt
        self.masked = np.arange(len(self.tokens)) >= len(prompt)
        self.limit = len(self.tokens)
        self._stops = frozenset(stops)
        self._fill = fill if fill is not None else next(iter(self._stops), mask)
        self._released = len(prompt)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to commit."""
        return not self.masked.any()

    def commit(self, positions: np.ndarray, tokens: np.ndarray) -> None:
        """Fix tokens at masked positions, int64 [K] each; behind a stop token nothing stays."""
        self.tokens[positions] = tokens
        self.masked[positions] = False
        ends = [int(p) for p, t in zip(positions, tokens, strict=True) if int(t) in self._stops]
        if ends and min(ends) + 1 < self.limit:
            self.limit = min(ends) + 1
            self.tokens[self.limit :] = self._fill
            self.masked[self.limit :] = False

    def release(self) -> list[int]:
        """Tokens that have become final since the last call: committed, nothing masked before."""
        first = self._released
        hidden = np.flatnonzero(self.masked[first : self.limit])
        last = first + int(hidden[0]) if len(hidden) else max(first, self.limit)
        self._released = last
        return self.tokens[first:last].tolist()
