# SPDX-License-Identifier: Apache-2.0
"""Segments of a block list that are compacted as a whole, and integers of one or many requests."""

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
# A number of one request (the scheduler), or one number per request (the worker).
Ints = TypeVar("Ints", int, IntArray)


def positive(x: Ints) -> Ints:
    """``max(x, 0)``."""
    return np.maximum(x, 0) if isinstance(x, np.ndarray) else max(x, 0)


def lesser(a: Ints, b: Ints) -> Ints:
    """``min(a, b)``."""
    return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)


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


class Ending(NamedTuple):
    """Segments that end in a step, in all layouts of one timing: see ``Segment``; int64 [S] each.

    A row occurs more than once only in the step of a resumed request.

    Attributes:
        row: The request's row in the batch.
        n: Its prompt length.
        start: First column.
        stop: Behind the last column.
        ends: Tokens that must be there.
    """

    row: IntArray
    n: IntArray
    start: IntArray
    stop: IntArray
    ends: IntArray

    def some(self, which: npt.NDArray[np.bool_] | slice) -> "Ending":
        """Some of the segments, by bool [S] or as a slice."""
        return Ending._make([field[which] for field in self])
