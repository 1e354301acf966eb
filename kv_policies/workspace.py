# SPDX-License-Identifier: Apache-2.0
"""How much memory compaction takes beside the cache, and how its work is cut to fit a bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

# Bytes that one part of the work may take, unless a single request needs more. Larger: fewer parts
# when many long prompts end in one step, less memory for the cache.
LIMIT: Final = 128 << 20
QUERIES: Final = 256  # most queries of a request that are observed at a time


class Heads(NamedTuple):
    """The attention heads of a layer on this rank.

    Attributes:
        kv: KV heads.
        group: Query heads per KV head.
        size: Channels of a head.
        itemsize: Bytes of a number in the cache, with those of the copy that is scored where the
            cache is quantized.
        device: "cpu" or "cuda".
    """

    kv: int
    group: int
    size: int
    itemsize: int
    device: str


class Transient(NamedTuple):
    """Bytes that some work takes at most at a time, beside its arguments and its result.

    Attributes:
        per_token: For each token and KV head.
        per_row: For each request and KV head.
        fixed: Whatever is worked on.
    """

    per_token: int
    per_row: int = 0
    fixed: int = 0

    def __add__(self, other: "Transient") -> "Transient":  # type: ignore[override]
        return Transient(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Workspace:
    """Cuts work on segments into parts whose transient memory stays below ``limit`` bytes.

    A part is some requests, padded to the longest, and some KV heads at a time. The least part is
    ``least_heads`` heads of one request. It is above the limit when the request is long enough, and
    ``peak`` counts it.
    """

    transient: Transient
    least_heads: int = 1
    limit: int = LIMIT

    def bytes(self, rows: int, tokens: int, heads: int) -> int:
        """Of a part of ``rows`` requests, each padded to ``tokens`` tokens."""
        per_token, per_row, fixed = self.transient
        return fixed + rows * heads * (per_row + tokens * per_token)

    def peak(self, tokens: int) -> int:
        """The most that a step takes if no request has more than ``tokens`` tokens."""
        return max(self.limit, self.bytes(1, tokens, self.least_heads))

    def rows(self, lengths: Sequence[int]) -> list[slice]:
        """Consecutive requests that one part can take, with the least heads at a time."""
        parts: list[slice] = []
        start = longest = 0
        for stop, length in enumerate(lengths):
            longest = max(longest, length)
            if stop > start and not self._fits(stop + 1 - start, longest, self.least_heads):
                parts.append(slice(start, stop))
                start, longest = stop, length
        return [*parts, slice(start, len(lengths))]

    def heads(self, rows: int, tokens: int, heads: int) -> list[slice]:
        """The KV heads that a part of ``rows`` requests can take at a time."""
        most = heads
        while most > self.least_heads and not self._fits(rows, tokens, most):
            most -= 1
        return [slice(first, min(first + most, heads)) for first in range(0, heads, most)]

    def _fits(self, rows: int, tokens: int, heads: int) -> bool:
        return self.bytes(rows, tokens, heads) <= self.limit
