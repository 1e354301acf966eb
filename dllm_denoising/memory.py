# SPDX-License-Identifier: Apache-2.0
"""The transient memory of a denoising step, and the parts in which a step is computed.

Logits and attention probabilities grow with what requests ask for. A block of 4,096 rows at a
vocabulary of 126,464 would take 2 GB for one float32 copy of its logits. Both are therefore
computed a few rows at a time, within a fixed size. No request can make a step take more memory, so
an engine reserves ``StepMemory.most`` once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# Bytes that one part takes. Larger parts read the output matrix and start kernels less often.
LOGITS = 512 << 20
KEYS = 256 << 20
PROBABILITIES = 256 << 20


@dataclass(frozen=True)
class StepMemory:
    """The sizes that a step's transient bytes depend on.

    Args:
        vocabulary: Number of tokens.
        width: Of a hidden state, in elements.
        itemsize: Bytes of an element of hidden states, logits and cache.
        heads: Query heads of this rank.
        kv_heads: Key heads of this rank.
        head_size: Of a head, in elements.
    """

    vocabulary: int
    width: int
    itemsize: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def predicted_row(self) -> int:
        """Bytes to predict one row.

        Its hidden state and logits, these twice where ranks gather them; then a float32 copy and
        noise, which is drawn in float64.
        """
        return self.itemsize * (self.width + 2 * self.vocabulary) + 12 * self.vocabulary

    @property
    def watched_key(self) -> int:
        """Bytes to watch one position: keys and values as read, or old and new keys in float32."""
        return self.kv_heads * self.head_size * max(3 * self.itemsize, self.itemsize + 4, 8)

    def watched_row(self, length: int) -> int:
        """Bytes of one row's probabilities, in float32, over ``length`` positions.

        Those before and now, and a product of both, by head; then sums over the heads.
        """
        return (12 * self.heads + 32) * length + 12 * self.heads * self.head_size

    @property
    def predicted_rows(self) -> int:
        """How many rows are predicted at a time."""
        return max(1, LOGITS // self.predicted_row)

    def watched_requests(self, length: int) -> int:
        """How many requests of up to ``length`` positions are watched at a time."""
        keys = KEYS // (self.watched_key * length)
        return max(1, min(keys, PROBABILITIES // self.watched_row(length)))

    def watched_rows(self, requests: int, length: int) -> int:
        """How many rows of each of so many requests are watched at a time."""
        return max(1, PROBABILITIES // (requests * self.watched_row(length)))

    def most(self, rows: int, requests: int, length: int, watches: bool) -> int:
        """Return the most bytes that a step takes at once.

        Args:
            rows: Of all requests together, at most.
            requests: At most.
            length: Of a request, at most.
            watches: Whether attention is watched. That happens in the layers, and predictions
                behind them, so the larger of both counts.
        """
        predicted = self.predicted_row * min(rows, self.predicted_rows)
        if not watches:
            return predicted
        keys = min(max(KEYS, self.watched_key * length), self.watched_key * length * requests)
        row = self.watched_row(length)
        return max(predicted, keys + min(max(PROBABILITIES, row), row * rows * requests))


def groups(lengths: Sequence[int], most: Callable[[int], int]) -> Iterator[slice]:
    """Cut requests into groups of neighbors.

    Args:
        lengths: Positions of each request.
        most: How many requests of up to a given length a group can have.
    """
    first = longest = 0
    for request, length in enumerate(lengths):
        if request > first and request - first >= most(max(longest, length)):
            yield slice(first, request)
            first, longest = request, 0
        longest = max(longest, length)
    if lengths:
        yield slice(first, len(lengths))


def parts(counts: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Cut rows of several owners, one owner after the other, into parts of at most ``most`` rows.

    Args:
        counts: Rows of each owner.
        most: Rows of a part, at least 1.

    Yields:
        Of each part, which owner has how many rows in it, in order.
    """
    part: list[tuple[int, int]] = []
    room = most
    for owner, count in enumerate(counts):
        while count:
            taken = min(count, room)
            part.append((owner, taken))
            count, room = count - taken, room - taken
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part
