# SPDX-License-Identifier: Apache-2.0
"""The tokens of one request while it is denoised: prompt, committed tokens and masks."""

from collections.abc import Collection, Sequence

import numpy as np


class Canvas:
    """A prompt and the masks behind it. Masks are committed in any order, released left to right.

    Attributes:
        prompt: Number of prompt tokens.
        tokens: int64 [N], where N is prompt + length.
        masked: bool [N], which positions are not committed yet.
        limit: Positions from here on are no longer wanted, because a stop token was committed
            before them. They hold the fill token.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        length: int,
        mask: int,
        stops: Collection[int] = (),
        fill: int | None = None,
    ) -> None:
        """Create a canvas without any committed token.

        Args:
            prompt: Token ids.
            length: Number of masks behind the prompt.
            mask: The mask token.
            stops: Tokens that end the text where the first of them is committed.
            fill: The token behind a stop token. One of the stop tokens by default.
        """
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
        """Whether all positions are committed."""
        return not self.masked.any()

    def commit(self, positions: np.ndarray, tokens: np.ndarray) -> None:
        """Fix tokens at masked positions, and drop what lies behind a stop token.

        Args:
            positions: int64 [K].
            tokens: int64 [K].
        """
        self.tokens[positions] = tokens
        self.masked[positions] = False
        ends = [int(p) for p, t in zip(positions, tokens, strict=True) if int(t) in self._stops]
        if ends and min(ends) + 1 < self.limit:
            self.limit = min(ends) + 1
            self.tokens[self.limit :] = self._fill
            self.masked[self.limit :] = False

    def release(self) -> list[int]:
        """Return the tokens that became final since the last call.

        A token is final when it is committed and no position before it is masked.
        """
        first = self._released
        hidden = np.flatnonzero(self.masked[first : self.limit])
        last = first + int(hidden[0]) if len(hidden) else max(first, self.limit)
        self._released = last
        return self.tokens[first:last].tolist()
