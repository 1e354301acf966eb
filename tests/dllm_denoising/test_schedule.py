# SPDX-License-Identifier: Apache-2.0
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm_denoising.base import current_block
from dllm_denoising.canvas import Canvas
from dllm_denoising.schedule import Blocks, Window

MASK = 9


def canvas_of(prompt: int, masked: list[bool]) -> Canvas:
    canvas = Canvas([1] * prompt, len(masked), MASK)
    known = prompt + np.flatnonzero(~np.array(masked))
    canvas.commit(known, np.full(len(known), 2))
    return canvas


CANVASES = st.builds(canvas_of, st.integers(0, 7), st.lists(st.booleans(), min_size=1, max_size=30))


@given(CANVASES, st.integers(1, 12))
def test_window_is_the_leftmost_masks(canvas: Canvas, length: int) -> None:
    active = Window(length).active(canvas)
    masked = [i for i, token in enumerate(canvas.tokens.tolist()) if token == MASK]
    assert active.dtype == np.int64 and active.tolist() == masked[:length]


def test_window_need_not_be_contiguous() -> None:
    canvas = canvas_of(3, [False, True, False, False, True, True, True])
    assert Window(3).active(canvas).tolist() == [4, 7, 8]


@given(CANVASES, st.integers(1, 12))
def test_masks_of_the_first_block_that_has_any(canvas: Canvas, length: int) -> None:
    schedule = Blocks(length)
    active = schedule.active(canvas)
    for first in range(canvas.prompt, len(canvas), length):
        block = list(range(first, min(first + length, len(canvas))))
        masked = [i for i in block if canvas.masked[i]]
        if masked:
            assert active.dtype == np.int64 and active.tolist() == masked
            assert current_block(canvas, schedule, active).tolist() == block
            return
    assert len(active) == 0


def test_blocks_follow_each_other_from_the_end_of_the_prompt() -> None:
    canvas, schedule = Canvas([1] * 5, 10, MASK), Blocks(4)
    seen = []
    while not canvas.finished:
        active = schedule.active(canvas)
        seen.append(active.tolist())
        canvas.commit(active[-2:], np.array([2] * len(active[-2:])))
    assert seen == [[5, 6, 7, 8], [5, 6], [9, 10, 11, 12], [9, 10], [13, 14]]


def test_a_stop_token_ends_the_block() -> None:
    canvas = Canvas([1], 8, MASK, [7])
    canvas.commit(np.array([3]), np.array([7]))
    assert Blocks(4).active(canvas).tolist() == Window(4).active(canvas).tolist() == [1, 2]
