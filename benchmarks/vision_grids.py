# SPDX-License-Identifier: Apache-2.0
"""Pictures of digits on a grid, and questions about them by position.

A cell is one patch of 8 x 8 pixels, which a vision tower turns into one token. Cells are named as
on a chess board: "c7" is the third column, seventh row. A digit has a color and a place in its
cell at random. All else is noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

SIDE: Final = 16  # cells
PATCH: Final = 8  # pixels of a cell
FILLED: Final = 64  # cells with a digit
COLUMNS: Final = "abcdefghijklmnop"
CELLS: Final = [f"{column}{row + 1}" for row in range(SIDE) for column in COLUMNS]
DIGITS: Final = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EMPTY: Final = -1
_NOISE: Final = 64  # brightness of what is no digit, below this

_FONT: Final = (  # 5 x 7 pixels: a row of a digit is a number of 5 bits
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 2, 4, 8, 31),
    (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)


def _shapes() -> np.ndarray[Any, Any]:
    """Each digit at each place in its cell, bool [10, places, PATCH, PATCH]."""
    made = np.zeros((10, 2, 4, PATCH, PATCH), bool)
    for digit, rows in enumerate(_FONT):
        pixels = np.array([[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in rows], bool)
        for down in range(2):
            for right in range(4):
                made[digit, down, right, down : down + 7, right : right + 5] = pixels
    return made.reshape(10, 8, PATCH, PATCH)


SHAPES: Final = _shapes()


def drawn(digits: np.ndarray[Any, Any], source: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw grids of digits.

    Args:
        digits: [B, rows, columns], ``EMPTY`` where there is none.
        source: Of places, colors and noise.

    Returns:
        uint8 [B, rows * PATCH, columns * PATCH, 3].
    """
    count, rows, columns = digits.shape
    place = source.integers(0, SHAPES.shape[1], digits.shape)
    shape = SHAPES[digits, place] & (digits != EMPTY)[..., None, None]
    color = source.integers(128, 256, (*digits.shape, 1, 1, 3), dtype=np.uint8)
    noise = source.integers(0, _NOISE, (*shape.shape, 3), dtype=np.uint8)
    cells = np.where(shape[..., None], color, noise)  # [B, rows, columns, PATCH, PATCH, 3]
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * PATCH, columns * PATCH, 3)


def filled(
    count: int, rows: int, columns: int, most: int, source: np.random.Generator
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Fill cells with digits at random.

    Returns:
        The digits, [count, rows, columns], and the filled cells in random order, numbers of cells
        in reading order, [count, min(most, rows * columns)].
    """
    cells = rows * columns
    digits = source.integers(0, 10, (count, cells))
    order = source.random((count, cells)).argsort(1)
    np.put_along_axis(digits, order[:, most:], EMPTY, 1)
    return digits.reshape(count, rows, columns), order[:, :most]


@dataclass(frozen=True)
class Grid:
    """A picture and what can be asked of it.

    Attributes:
        image: A PIL image of SIDE * PATCH pixels a side.
        cells: Such as "c7", every filled cell once, in random order.
        answers: Such as "four", what each of these shows.
    """

    image: Any
    cells: Sequence[str]
    answers: Sequence[str]


def grid(seed: int) -> Grid:
    """Return the picture of a seed."""
    from PIL import Image

    source = np.random.default_rng([seed, SIDE])
    digits, cells = filled(1, SIDE, SIDE, FILLED, source)
    image = Image.fromarray(drawn(digits, source)[0])
    answers = [DIGITS[digit] for digit in digits.reshape(-1)[cells[0]]]
    return Grid(image, [CELLS[cell] for cell in cells[0]], answers)
