# SPDX-License-Identifier: Apache-2.0
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_common.errors import CompressError
from depth_pruning.searches.base import checked, lowest
from depth_pruning.searches.evopress import swapped
from depth_pruning.searches.registry import build_search, searches
from depth_pruning.searches.window import window_starts


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(0, 999))
def test_a_swap_keeps_the_number_of_blocks(genome: list[int], seed: int) -> None:
    child = swapped(tuple(genome), Random(seed))
    if sum(genome) in (0, len(genome)):
        assert child is None
    else:
        assert child is not None and sum(child) == sum(genome) and child != tuple(genome)
        assert sum(a != b for a, b in zip(child, genome, strict=True)) <= 6


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 6))
def test_windows_are_all_runs_of_candidates(candidates: set[int], count: int) -> None:
    runs = [s for s in range(31) if all(s + i in candidates for i in range(count))]
    assert window_starts(candidates, count) == runs


@given(st.dictionaries(st.integers(0, 30), st.floats(0, 9), min_size=1), st.data())
def test_the_lowest_are_no_dearer_than_the_rest(
    costs: dict[int, float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(costs)))
    chosen = lowest(costs, count)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) == count
    rest = [cost for index, cost in costs.items() if index not in chosen]
    assert not rest or max(costs[index] for index in chosen) <= min(rest)


@pytest.mark.parametrize("dropped", [(1,), (1, 1), (1, 2, 3), (0, 1)])
def test_a_set_that_was_not_asked_for_is_refused(dropped: tuple[int, ...]) -> None:
    with pytest.raises(CompressError, match="2 of 1-3 were asked for"):
        checked(dropped, 2, (1, 2, 3))
    assert checked((3, 1), 2, (1, 2, 3)) == (1, 3)


def test_too_few_candidates_are_said() -> None:
    with pytest.raises(CompressError, match="only 1 blocks may go, not 2"):
        lowest({3: 0.1}, 2)


def test_settings_are_checked_by_name() -> None:
    names = {"auto", "block_influence", "evopress", "greedy"}
    assert names | {"macro_influence", "single_drop", "window"} <= searches().keys()
    with pytest.raises(CompressError, match="did you mean 'greedy'"):
        build_search("greedi", {})
    with pytest.raises(CompressError, match="unknown setting 'tokenz'"):
        build_search("evopress", {"tokenz": [1]})
