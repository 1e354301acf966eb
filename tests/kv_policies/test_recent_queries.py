# SPDX-License-Identifier: Apache-2.0
"""The queries that score a window are those of its last tokens, whatever came in between."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.layout.tokens import TokenLayout
from kv_policies.recent_queries import RecentQueries
from tests.support.layout_sim import step_of

COUNT, REQUESTS = 3, 4


def rings(requests: int = REQUESTS) -> RecentQueries:
    return RecentQueries(COUNT, requests, 1, 1, 1, torch.float32, torch.device("cpu"))


def run(recent: RecentQueries, names: list[str], rows: list[tuple[int, int, int]]) -> None:
    """A step of requests (n, c, q). The query of a token is 1000 times its request plus its
    position."""
    step = step_of(*rows)
    step.ids[:] = names
    query = torch.cat(
        [
            1000 * int(name) + torch.arange(c, c + q)
            for name, (_, c, q) in zip(names, rows, strict=True)
        ]
    )
    storing = recent.storing(step, torch.from_numpy(step.end))
    if storing is not None:
        recent.stored.index_copy_(0, storing.places, query[storing.tokens].float()[:, None, None])


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_last_queries_of_a_window_are_there_when_it_ends(data: st.DataObject) -> None:
    recent = rings()
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=REQUESTS))
    computed, furthest = [0] * len(lengths), [0] * len(lengths)
    for _ in range(25):
        batch = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
        rows = []
        for at in sorted(batch):
            known = max(lengths[at], furthest[at]) - computed[at]
            q = data.draw(st.integers(1, known)) if known > 0 else 1
            rows.append((lengths[at], computed[at], q))
            computed[at] += q
        run(recent, [str(at) for at in sorted(batch)], rows)
        for at in sorted(batch):
            if computed[at] - lengths[at] >= COUNT:
                (places,) = recent.last([str(at)], np.array([computed[at]]))
                want = [1000 * at + computed[at] - COUNT + i for i in range(COUNT)]
                assert recent.stored[places].flatten().tolist() == want
        if data.draw(st.integers(0, 5)) == 0:  # a preemption
            at = data.draw(st.integers(0, len(lengths) - 1))
            recent.forget(str(at))
            furthest[at], computed[at] = computed[at], 0
    for at in range(len(lengths)):
        recent.forget(str(at))
    assert len(recent) == 0


def test_prompts_and_those_that_opted_out_store_nothing() -> None:
    recent = rings()
    run(recent, ["1", "2"], [(5, 0, 5), (0, 0, 7)])
    assert len(recent) == 0 and not recent.stored.any()
    run(recent, ["1", "2"], [(5, 5, 1), (0, 7, 1)])
    assert len(recent) == 1
    assert recent.stored[: REQUESTS * COUNT].count_nonzero() == 1


def test_steps_that_decode_store_from_the_same_memory() -> None:
    recent = rings()
    seen = []
    for c in range(5, 12):
        step = step_of((5, c, 1), (4, c, 1))
        storing = recent.storing(step, torch.from_numpy(step.end))
        assert storing is not None and storing.tokens == slice(2)
        seen.append(storing.places.data_ptr())
    assert len(set(seen)) == 1


def test_a_pass_of_a_step_stores_its_own_tokens() -> None:
    """Also where each row of the pass has one token: its place among those of the step counts."""
    recent, layout = rings(), TokenLayout(2, Fraction(1, 2), window=4)
    step = step_of((4, 0, 9), (4, 7, 1))  # the first resumes past its prompt and a window
    query = torch.cat([torch.arange(9), 1000 + torch.arange(7, 8)]).float()[:, None, None]
    for _, passed in step.passes(layout):
        if storing := recent.storing(passed, torch.from_numpy(passed.end)):
            recent.stored[storing.places] = query[storing.tokens]
    for name, want in (("0", [6, 7, 8]), ("1", [0, 0, 1007])):
        (places,) = recent.last([name], np.array([9 if name == "0" else 8]))
        assert recent.stored[places].flatten().tolist() == want


def test_more_requests_than_may_run_are_an_error() -> None:
    recent = rings(1)
    run(recent, ["1"], [(5, 5, 1)])
    with pytest.raises(RuntimeError, match="request 2 has no room .* --max-num-seqs"):
        run(recent, ["2"], [(5, 5, 1)])
    recent.forget("1")
    run(recent, ["2"], [(5, 5, 1)])
