# SPDX-License-Identifier: Apache-2.0
"""What one step did is counted once, however it was done."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from kv_policies.compaction import workspace
from kv_policies.layout.tokens import TokenLayout
from kv_policies.plan import Tally
from kv_policies.planner import Planner
from kv_policies.registry import build_policy
from kv_policies.workspace import Heads
from tests.support.layout_sim import step_of
from vllm_plugin.kv_cache.activity import Activity, counting_layer


def test_three_windows_of_a_resumed_request_are_three() -> None:
    """Its step has a pass for the prompt and one for each window."""
    layout = TokenLayout(16, Fraction(1, 4), 64)
    step = step_of((128, 32, 128 - 32 + 3 * 64 + 5))
    passes = [part for _, part in step.passes(layout)]
    assert len(passes) == 5
    policy = build_policy("recent", {})
    planner = Planner([layout], policy, workspace(policy, Heads(1, 1, 8, 4, "cpu")))
    works = [
        planner.work(layout, part, torch.arange(len(part.n) * 32).view(-1, 32)) for part in passes
    ]
    counted = [tally for work in works if work for tally in work.tallies]
    activity = Activity(layers=4)
    for _ in range(2):  # groups of two layers
        activity.plan(counted, 2)
    done = activity.take()
    assert done.segments == {"prompt": 1, "window": 3}
    assert done.tokens == 128 + 3 * 64 and done.evicted == 0.75 * done.tokens


def test_groups_that_keep_all_of_a_window_do_not_add_up() -> None:
    activity = Activity(layers=2)
    activity.plan([Tally("prompt", 2, 200, 100), Tally("window", 1, 64, 32)], 1)
    activity.plan([Tally("prompt", 2, 200, 150)], 1)
    assert activity.take().segments == {"prompt": 2, "window": 1}


def test_rows_that_pad_a_batch_are_no_requests() -> None:
    step = step_of((128, 0, 128), (0, 0, 0))
    ending = step.ending(TokenLayout(16, Fraction(1, 4)))
    assert list(ending) == ["prompt"] and np.array_equal(ending["prompt"].row, [0])


def test_stages_together_count_what_one_process_does() -> None:
    """Six layers of three levels on two stages: a level is on one of them, or on both."""
    shares = [Fraction(1, 2), Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 4), 1]
    layouts = {layer: TokenLayout(16, Fraction(share)) for layer, share in enumerate(shares)}
    step = step_of((128, 0, 128), (64, 60, 4), (30, 0, 30))
    policy = build_policy("recent", {})
    planner = Planner(list(layouts.values()), policy, workspace(policy, Heads(1, 1, 8, 4, "cpu")))
    table = torch.arange(len(step.n) * 32).view(-1, 32)

    def count(activity: Activity, stage: range) -> None:
        groups = Counter(layout for layer, layout in layouts.items() if layer in stage)
        for layout, layers in groups.items():
            if work := planner.work(layout, step, table):
                activity.plan(work.tallies, layers)
        with activity.timed():
            pass

    whole = Activity(len(layouts))
    count(whole, range(6))
    expected, reports = whole.take(), []
    counting = counting_layer(layouts)
    assert counting == 3
    for stage in (range(3), range(3, 6)):
        activity = Activity(len(layouts), counting in stage)
        count(activity, stage)
        reports.append(activity.take())
    assert [bool(done.segments) for done in reports] == [False, True]
    assert reports[1].segments == expected.segments == {"prompt": 2}
    assert [done.seconds > 0 for done in reports] == [False, True]
    assert sum(done.tokens for done in reports) == pytest.approx(expected.tokens)
    assert sum(done.evicted for done in reports) == pytest.approx(expected.evicted)
