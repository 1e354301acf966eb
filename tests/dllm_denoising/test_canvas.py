# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_denoising.canvas import Canvas

MASK, STOPS = 9, (7, 8)


def commit(canvas: Canvas, tokens: dict[int, int]) -> None:
    canvas.commit(np.array(list(tokens)), np.array(list(tokens.values())))


def test_committed_in_any_order_released_in_order() -> None:
    canvas = Canvas([1, 2], 4, MASK)
    assert len(canvas) == 6 and canvas.tokens.tolist() == [1, 2, *[MASK] * 4]
    assert canvas.masked.tolist() == [False] * 2 + [True] * 4
    commit(canvas, {5: 3})
    assert canvas.release() == []
    commit(canvas, {2: 4})
    assert canvas.release() == [4] and canvas.release() == []
    commit(canvas, {4: 5, 3: 6})
    assert canvas.release() == [6, 5, 3] and canvas.release() == []
    assert canvas.finished and canvas.limit == 6


def test_first_stop_token_wins() -> None:
    """An earlier one that is committed later moves the limit, a later one never does."""
    canvas = Canvas([7, 1], 6, MASK, STOPS, fill=0)  # the prompt's stop token is text
    commit(canvas, {7: 2, 5: 8})
    assert canvas.limit == 6 and canvas.release() == []
    assert canvas.tokens.tolist() == [7, 1, MASK, MASK, MASK, 8, 0, 0]
    assert np.flatnonzero(canvas.masked).tolist() == [2, 3, 4]
    commit(canvas, {2: 3})
    assert canvas.limit == 6 and canvas.release() == [3] and not canvas.finished
    commit(canvas, {3: 7})
    assert canvas.limit == 4 and canvas.release() == [7] and canvas.finished
    assert canvas.tokens.tolist() == [7, 1, 3, 7, 0, 0, 0, 0]


@pytest.mark.parametrize("order", [(3, 5), (5, 3)])
def test_stop_tokens_of_one_step(order: tuple[int, int]) -> None:
    canvas = Canvas([1, 2], 5, MASK, STOPS, fill=0)
    commit(canvas, {position: 7 for position in order} | {6: 4})
    assert canvas.limit == 4 and canvas.tokens.tolist() == [1, 2, MASK, 7, 0, 0, 0]
    commit(canvas, {2: 4})
    assert canvas.release() == [4, 7] and canvas.finished


def test_a_stop_token_at_the_end_and_default_fill() -> None:
    canvas = Canvas([], 2, MASK, [7])
    commit(canvas, {1: 7})
    assert canvas.limit == 2 and not canvas.finished
    commit(canvas, {0: 7})
    assert canvas.limit == 1 and canvas.tokens.tolist() == [7, 7] and canvas.release() == [7]


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_random_orders(data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, 8), max_size=4))
    stops = data.draw(st.sets(st.sampled_from(STOPS)))
    canvas = Canvas(prompt, data.draw(st.integers(1, 12)), MASK, stops, fill=0)
    released: list[int] = []
    ends = {len(canvas)}
    while not canvas.finished:
        masked = np.flatnonzero(canvas.masked).tolist()
        chosen = data.draw(st.lists(st.sampled_from(masked), min_size=1, unique=True))
        tokens = {position: data.draw(st.integers(0, 8)) for position in chosen}
        commit(canvas, tokens)
        ends |= {position + 1 for position, token in tokens.items() if token in stops}
        assert canvas.limit == min(ends)
        behind = slice(canvas.limit, None)
        assert not canvas.masked[behind].any() and (canvas.tokens[behind] == 0).all()
        assert (canvas.masked == (canvas.tokens == MASK)).all()
        for position, token in tokens.items():
            assert canvas.tokens[position] == (token if position < canvas.limit else 0)
        released += canvas.release()
        last = len(prompt) + len(released)  # what was released never changes afterwards
        assert canvas.tokens[:last].tolist() == prompt + released
        assert last == canvas.limit or canvas.masked[last]
    assert released == canvas.tokens[len(prompt) : canvas.limit].tolist()
    assert not set(released[:-1]) & stops and canvas.release() == []
