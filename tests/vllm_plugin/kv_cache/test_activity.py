# SPDX-License-Identifier: Apache-2.0
"""What one step did is counted once, however it was done."""

from fractions import Fraction

import numpy as np
import torch

from kv_policies.compaction import workspace
from kv_policies.layout.tokens import TokenLayout
from kv_policies.plan import Tally
from kv_policies.planner import Planner
from kv_policies.registry import build_policy
from kv_policies.workspace import Heads
from tests.support.layout_sim import step_of
from vllm_plugin.kv_cache.activity import Activity


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
