# SPDX-License-Identifier: Apache-2.0
"""What an engine keeps free beside the cache covers what it stores."""

from fractions import Fraction

import pytest
import torch

from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.tokens import TokenLayout
from kv_policies.memory import Beside, Load, beside_cache
from kv_policies.recent_queries import RecentQueries
from kv_policies.registry import build_policy
from kv_policies.window_policy import window_queries
from kv_policies.workspace import LIMIT, Heads

HEADS = Heads(kv=2, group=2, size=32, itemsize=4, device="cpu")
BUDGET = BoundedLayout(32, 256, 64)


def beside(name: str, layouts: list[Layout], load: Load, heads: Heads = HEADS) -> Beside:
    dtype = {2: torch.bfloat16, 4: torch.float32}[heads.itemsize]
    return beside_cache(build_policy(name, {}), layouts, heads, load, dtype)


@pytest.mark.parametrize(("requests", "layers"), [(1, 1), (7, 3)])
def test_stored_queries_are_those_of_the_rings(requests: int, layers: int) -> None:
    policy = build_policy("r_kv", {})
    count = window_queries(policy, BUDGET)
    rings = RecentQueries(count, requests, layers, 4, 32, torch.float32, torch.device("cpu"))
    found = beside("r_kv", [BUDGET] * layers, Load(1000, 1, requests))
    assert found.queries == rings.stored.nbytes
    assert found.total == found.work + found.observed + found.queries >= LIMIT


def test_queries_in_fp8_are_counted_once() -> None:
    """In 16 or 32 bits, of one layer at a time."""
    half, load = TokenLayout(32, Fraction(1, 2)), Load(1000, 1, 16)
    for layers in (1, 3):
        plain, fp8 = (
            beside("snap_kv", [half] * layers, load._replace(fp8_queries=tokens))
            for tokens in (0, 8192)
        )
        assert fp8.total - plain.total == fp8.step == 8192 * 4 * 32 * 4


def test_figures_of_an_8b_model_in_the_docs() -> None:
    heads, layout = Heads(8, 4, 128, 2, "cuda"), BoundedLayout(16, 4096, 256)
    for name, gib in (("r_kv", 0.5), ("h2o", 2.0), ("key_diff", 0.0), ("snap_kv", 0.0)):
        found = beside(name, [layout] * 32, Load(32_768, 1, 256), heads)
        assert found.queries / 2**30 == pytest.approx(gib, abs=0.01)


def test_what_is_never_compacted_takes_nothing() -> None:
    whole = TokenLayout(32, Fraction(1), window=64)
    assert beside("h2o", [whole] * 4, Load(1000, 1, 16)) == Beside()
    # Layers that keep their windows store no queries.
    half = TokenLayout(32, Fraction(1, 2))
    found = [beside("h2o", layouts, Load(1000, 1, 16)) for layouts in ([half], [half, BUDGET])]
    assert found[0].queries == 0 < found[1].queries
    assert 2 * found[0].observed == found[1].observed > 0
