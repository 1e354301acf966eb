# SPDX-License-Identifier: Apache-2.0
"""What a step copies to the device, and that it waits for nothing there."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from kv_policies.compaction import Layer, Observations, compact, workspace
from kv_policies.latents.packing import Packer, fresh_blocks
from kv_policies.latents.reading import LatentView
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from kv_policies.planner import Planner
from kv_policies.recent_queries import RecentQueries
from kv_policies.registry import build_policy
from kv_policies.transfer import to_device
from kv_policies.window_policy import window_queries
from tests.kv_policies.layout.sims import Unit
from tests.kv_policies.test_compaction import CHOOSING, DIM, HEADS, SHAPE, DensePages
from tests.support.device import Device
from tests.support.layout_sim import step_of

META = torch.device("meta")


def test_the_device_sees_what_waits() -> None:
    """Or the tests that use it could not fail."""
    with Device() as seen:
        indices = torch.arange(4)
        kept = torch.zeros(8, device="meta")
        assert (seen.operations, seen.waits) == (["zeros"], [])
        indices.to("meta", non_blocking=True)  # not pinned
        kept[indices]
        kept[:4].copy_(indices)
        assert len(seen.waits) == 3 and not seen.copies
        for array in (np.arange(4), np.arange(8)[::2]):
            (there,) = to_device(kept.device, array)
            assert kept[there].shape == (4,)
        assert len(seen.waits) == 3 and seen.copies == 2
        pinned = torch.empty(4, 4, pin_memory=True)
        pinned.to("meta")
        pinned[:, :2].to("meta", non_blocking=True)
        assert len(seen.waits) == 5 and seen.copies == 2
        kept[:4].copy_(pinned[0], non_blocking=True)
        kept[:4].copy_(pinned[0])
        assert len(seen.waits) == 6 and seen.copies == 3
        with pytest.raises(RuntimeError):
            kept.sum().item()
        with pytest.raises(RuntimeError):
            kept[kept > 0]


def test_arrays_go_in_one_copy_from_memory_of_their_own() -> None:
    """PyTorch gives the memory to others only once the copy is done: see ``to_device``."""
    arrays = np.arange(6).reshape(2, 3).T, np.zeros(0, np.int64), np.array([7, 8])
    with Device() as seen:
        there = to_device(META, *arrays)
        to_device(META, np.array([9]))
    assert [tensor.shape for tensor in there] == [(3, 2), (0,), (2,)]
    assert [memory.tolist() for memory in seen.pinned] == [[0, 3, 1, 4, 2, 5, 7, 8], [9]]
    assert seen.copies == 2 and not seen.waits
    for array, tensor in zip(arrays, to_device(torch.device("cpu"), *arrays), strict=True):
        assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize("name", CHOOSING)
def test_compaction_waits_for_nothing(name: str) -> None:
    """A prompt that ends, one that does not, and a decode window, with every policy."""
    policy, layout = build_policy(name, {}), TokenLayout(4, Fraction(1, 2), window=8)
    step = step_of((43, 0, 43), (20, 0, 10), (16, 31, 1))
    pages, space = DensePages(64), workspace(policy, SHAPE)
    pages.k, pages.v = pages.k.to(META), pages.v.to(META)
    layer = Layer("layer", 7, pages, SHAPE, policy, space, Observations())
    recent = None
    if count := window_queries(policy, layout):
        recent = RecentQueries(count, 3, 1, HEADS, DIM, torch.float32, META)
        layer = replace(layer, recent=recent.stored)
    with Device() as seen:
        table = torch.zeros(3, 16, dtype=torch.int32, device=META)
        LiveView(layout).update(step, table, table[:, 0])
        work = Planner([layout], policy, space, recent).work(layout, step, table)
        assert work is not None and work.prompts and work.windows
        query = torch.zeros(54, HEADS, DIM, device=META)
        compact(work, layer, query)
    assert seen.copies and not seen.waits


def test_plans_of_latents_wait_for_nothing() -> None:
    layout = LatentLayout(4, 8, 4, window=8)
    step = step_of((43, 0, 43), (20, 24, 6), (16, 31, 1))
    with Device() as seen:
        table = torch.zeros(3, 16, dtype=torch.int32, device=META)
        view, _ = LiveView(layout).update(step, table, table[:, 0])
        assert LatentView(layout).update(step, table, view) is not None
        assert fresh_blocks(layout, step, table) is not None
        assert Packer([(layout, Unit(1, 1, 16, 8, 4))]).work(layout, step, table) is not None
    assert seen.copies and not seen.waits
