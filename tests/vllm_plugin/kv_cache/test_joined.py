# SPDX-License-Identifier: Apache-2.0
"""Decode windows of all layers at once, in the two orders in which vLLM allocates layers."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from kv_policies.base import Capabilities, Context, QueryFreePolicy
from kv_policies.compaction import Layer, Observations, workspace
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.planner import Planner
from kv_policies.policies.expected_attention import ExpectedAttention
from kv_policies.policies.key_diff import KeyDiff
from kv_policies.policies.r_kv import RKV
from kv_policies.recent_queries import RecentQueries
from kv_policies.window_policy import window_queries
from kv_policies.windows import compact_windows
from kv_policies.workspace import LIMIT, Heads
from vllm_plugin.kv_cache.joined import join
from vllm_plugin.kv_cache.pages import Pages

LAYERS, BLOCKS, HEADS, BLOCK, SIZE = 5, 40, 2, 16, 8
ELEMENTS = HEADS * BLOCK * 2 * SIZE
SHAPE = Heads(HEADS, 2, SIZE, 4, "cpu")


def allocated(order: str, between: int = 0) -> list[Pages]:
    """Layers of one allocation, their blocks side by side or block by block.

    ``between``: elements behind each block that belong to others.
    """
    page = ELEMENTS + between
    buffer = torch.randn(3 + LAYERS * BLOCKS * page)
    step, stride = (BLOCKS * page, page) if order == "layers" else (page, LAYERS * page)
    pages = []
    for layer in range(LAYERS):
        shape = (BLOCKS, HEADS, BLOCK, 2 * SIZE)
        strides = (stride, BLOCK * 2 * SIZE, 2 * SIZE, 1)
        cache = buffer.as_strided(shape, strides, 3 + layer * step)

        def write(
            key: torch.Tensor,
            value: torch.Tensor,
            slots: torch.Tensor,
            cache: torch.Tensor = cache,
        ) -> None:
            cache[slots // BLOCK, :, slots % BLOCK] = torch.cat((key, value), -1)

        pages.append(Pages.of(cache, HEADS, BLOCK, SIZE, write))
    return pages


@pytest.mark.parametrize("between", [0, 6, 2 * ELEMENTS])
@pytest.mark.parametrize("order", ["layers", "blocks"])
def test_a_joined_block_is_that_of_its_layer(order: str, between: int) -> None:
    pages = allocated(order, between)
    joined = join(pages)
    assert joined is not None
    blocks = torch.tensor([[3, 0], [BLOCKS - 1, 7], [1, 2]])
    for some in (slice(0, LAYERS), slice(1, 3)):
        found = joined.pages.keys(joined.blocks(some, blocks))
        assert torch.equal(found, torch.cat([layer.keys(blocks) for layer in pages[some]]))
        found = joined.pages.values(joined.blocks(some, blocks))
        assert torch.equal(found, torch.cat([layer.values(blocks) for layer in pages[some]]))


def test_what_cannot_be_joined() -> None:
    pages = allocated("layers")
    assert join([pages[0], allocated("layers")[0]]) is None  # memory of their own
    assert join([pages[0], pages[1], replace_first(pages[2])]) is None  # blocks would overlap
    assert join(pages[:1]) is not None


def replace_first(pages: Pages) -> Pages:
    """The same layer, half a block later."""
    later = pages.blocks.as_strided(
        pages.blocks.shape,
        pages.blocks.stride(),
        pages.blocks.storage_offset() - ELEMENTS // 2,
    )
    return Pages(later, *pages.orders, pages.shape)


class ByLayer(QueryFreePolicy):
    """Sees that windows come without the index of their layer."""

    name = "by_layer"
    capabilities = Capabilities(frozenset({"keys"}), False, False, "")

    def score(self, context: Context) -> torch.Tensor:
        assert context.layer is None and context.keys is not None
        return context.keys.mean((1, 3))[:, None]


@pytest.mark.parametrize("order", ["layers", "blocks"])
@pytest.mark.parametrize("limit", [LIMIT, 150_000, 1])
@pytest.mark.parametrize("kind", [KeyDiff, ByLayer, RKV, ExpectedAttention])
def test_layers_at_once_are_layer_by_layer(order: str, limit: int, kind: type) -> None:
    """Bit for bit, also where memory is for some of the layers, or for some of the heads of one."""
    torch.manual_seed(0)
    layout = TokenLayout(BLOCK, Fraction(1, 2), window=4 * BLOCK)
    table = torch.randperm(BLOCKS)[:30].view(3, 10).int()
    n, c = np.array([16, 20, 31]), np.array([79, 95, 40])  # two windows end, one does not
    step = Step(n, c, np.array([1, 1, 1]), np.arange(3), ["a", "b", "c"])
    policy = kind(kind.settings_type())
    space = replace(workspace(policy, SHAPE), limit=limit)
    recent = None
    if count := window_queries(policy, layout):
        recent = RecentQueries(count, 3, LAYERS, 2 * HEADS, SIZE, torch.float32, table.device)
        recent.stored.normal_()
    work = Planner([layout], policy, space, recent).work(layout, step, table)
    assert work is not None and not work.prompts
    results = []
    for together in (True, False):
        torch.manual_seed(1)
        pages = allocated(order)
        before = [x.blocks.clone() for x in pages]
        layers = [
            Layer(str(at), at, x, SHAPE, policy, space, Observations())
            for at, x in enumerate(pages)
        ]
        if recent is not None:
            layers = [
                replace(layer, recent=recent.stored, first_recent=at * recent.places)
                for at, layer in enumerate(layers)
            ]
        if policy.capabilities.counts_sinks:
            layers = [replace(layer, sinks=torch.randn(2 * HEADS)) for layer in layers]
        compact_windows(work.windows, layers, join(pages) if together else None)
        results.append([x.blocks.clone() for x in pages])
        changed = [
            set((after != old).any(1).nonzero().flatten().tolist())
            for after, old in zip(results[-1], before, strict=True)
        ]
        assert changed == [{*table[0, 3:5].tolist(), *table[1, 4:6].tolist()}] * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
