# SPDX-License-Identifier: Apache-2.0
"""A budget of tokens: what the layout promises, for any prompt and any generation."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.segments import Segment
from tests.kv_policies.layout.sims import bounded_layouts, windowed_layouts
from tests.support.layout_sim import live_columns

LAYOUT = BoundedLayout(16, 8 * 16, 2 * 16)


def test_pictures_of_the_module_text() -> None:
    n = 12 * 16 + 5
    assert live_columns(LAYOUT, n, n, 13) == [*range(4, 13)]
    assert live_columns(LAYOUT, n, 15 * 16, 15) == [*range(7, 15)]
    assert live_columns(LAYOUT, n, 17 * 16, 17) == [*range(9, 17)]
    assert [*LAYOUT.segments(n, 17 * 16, after=15 * 16)] == [Segment(7, 17, 8, 17 * 16)]
    short = 3 * 16
    assert live_columns(LAYOUT, short, 8 * 16, 8) == [*range(8)]
    assert live_columns(LAYOUT, short, 10 * 16, 10) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_how_far_a_prefix_hit_may_reach() -> None:
    assert LAYOUT.hit_limit(3 * 16 + 5) == 3 * 16  # a short prompt: all of it
    assert LAYOUT.cacheable(3 * 16 + 5, 10**6) == 6 * 16  # generated tokens as well
    assert LAYOUT.hit_limit(12 * 16 + 5) == 4 * 16  # a long one: all but the budget
    assert LAYOUT.hit_limit(7 * 16 + 5) == 2 * 16  # one in between: little


@given(bounded_layouts(), st.integers(1, 200), st.integers(0, 400))
@settings(deadline=None, max_examples=300)
def test_what_is_live_never_exceeds_the_budget(layout: BoundedLayout, n: int, more: int) -> None:
    c, size = n + more, layout.block_size
    live = len(live_columns(layout, n, c, -(-c // size)))
    # A window, and the block that is being filled or the tail of a long prompt.
    assert live * size <= layout.budget + layout.window + size
    if n // size > layout.budget // size:
        assert len(live_columns(layout, n, n, n // size)) * size == layout.budget


@given(windowed_layouts(), st.integers(1, 200), st.integers(0, 400), st.integers(1, 60))
@settings(deadline=None, max_examples=300)
def test_a_prompt_window_bounds_prompts_too(
    layout: BoundedLayout, prompt: int, c: int, in_flight: int
) -> None:
    """Whatever the prompt, with steps in flight. One that fits the window is as it was without."""
    longest, size = 600, layout.block_size
    n, settled = layout.head(prompt), max(0, c - in_flight)
    freed = sum(stop - first for first, stop in layout.freed(n, settled))
    most = layout.most_columns(longest, in_flight)
    assert -(-c // size) - freed <= most <= -(-longest // size)
    plain = replace(layout, prompt_window=0)
    if prompt <= layout.prompt_window:
        assert n == prompt and layout.freed(n, c) == plain.freed(prompt, c)
        assert layout.hit_limit(n) == plain.hit_limit(prompt)
    else:  # it overwrites what a prompt of the window's length overwrites
        assert layout.hit_limit(n) == layout.prompt_window - layout.budget
    full = prompt // size * size  # what a cache lookup knows
    assert layout.cacheable(layout.head(full), prompt - 1) <= layout.cacheable(n, prompt - 1)
    assert plain.most_columns(longest, in_flight) == -(-longest // size)


@given(bounded_layouts(), st.integers(1, 200), st.integers(0, 400))
@settings(deadline=None)
def test_a_short_request_is_left_alone(layout: BoundedLayout, n: int, c: int) -> None:
    if max(n, c) <= layout.budget:
        assert layout.freed(n, c) == []


@given(bounded_layouts(), st.integers(1, 200))
@settings(deadline=None)
def test_the_first_destination_is_what_the_segments_say(layout: BoundedLayout, n: int) -> None:
    enough = n + 2 * layout.budget + 2 * layout.window
    first = min(segment.destination[0] for segment in layout.segments(n, enough))
    assert layout.first_destination(n) == first
    size = layout.block_size
    if n + size + 2 * layout.window <= layout.budget - size:
        assert layout.hit_limit(n) == (n - 1) // size * size


def test_bad_arguments_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        BoundedLayout(16, 40, 0, min_prompt=16)
    assert "3 problems" in str(caught.value)
    with pytest.raises(CompressError, match="less than two decode windows"):
        BoundedLayout(16, 48, 32)
    with pytest.raises(CompressError, match="prompt window of 128 tokens is not more than the bu"):
        BoundedLayout(16, 128, 32, prompt_window=128)
