# SPDX-License-Identifier: Apache-2.0
"""What holds for every layout."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.layout.base import Layout
from tests.kv_policies.layout.sims import (
    bounded_layouts,
    bounded_sims,
    latent_layouts,
    latent_sims,
    token_layouts,
    token_sims,
)
from tests.support.layout_sim import Sim, live


@pytest.mark.parametrize(
    "sims", [token_sims(), bounded_sims(), latent_sims()], ids=["tokens", "bounded", "latents"]
)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_every_interleaving_reads_the_right_tokens(
    sims: st.SearchStrategy[Sim], data: st.DataObject
) -> None:
    live(data.draw(sims), data)


@pytest.mark.parametrize(
    "layouts",
    [token_layouts(), bounded_layouts(), latent_layouts().map(lambda drawn: drawn[0])],
    ids=["tokens", "bounded", "latents"],
)
@given(data=st.data(), n=st.integers(1, 120), longest=st.integers(1, 300))
@settings(deadline=None)
def test_the_full_blocks_of_a_prompt_tell_how_far_a_hit_may_reach(
    layouts: st.SearchStrategy[Layout], data: st.DataObject, n: int, longest: int
) -> None:
    layout = data.draw(layouts)
    full = n // layout.block_size * layout.block_size
    assert layout.cacheable(full, min(longest, n - 1)) <= layout.cacheable(n, n - 1)
    if layout.first_destination(n) is None:
        assert layout.cacheable(full, n - 1) == n - 1
