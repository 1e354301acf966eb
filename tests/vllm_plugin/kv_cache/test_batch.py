# SPDX-License-Identifier: Apache-2.0
"""What is known of a request goes with it."""

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_plugin.kv_cache.activity import Activity
from vllm_plugin.kv_cache.batch import Batch


@pytest.mark.parametrize("event", ["finished_req_ids", "preempted_req_ids"])
def test_observations_of_a_request_that_leaves_are_forgotten(event: str) -> None:
    batch = Batch(None, v2=False, activity=Activity(1), head=lambda n: n)
    for request in ("stays", "leaves"):
        batch.observations.keep(request, "layer", torch.zeros(1, 4))
    scheduled = SchedulerOutput.make_empty()
    setattr(scheduled, event, {"leaves"})
    with batch.step(scheduled):
        assert len(batch.observations) == 1
        batch.observations.add("stays", "layer", torch.zeros(1, 4), first=False)
