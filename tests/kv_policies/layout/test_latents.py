# SPDX-License-Identifier: Apache-2.0
"""Raw tokens and latents together are all tokens, each once, in blocks of the request's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_common.errors import CompressError
from kv_policies.latents.packing import fresh_blocks
from kv_policies.latents.reading import LatentView
from kv_policies.layout.latents import LatentBlocks, LatentLayout
from kv_policies.layout.latents import latent_blocks as all_latent_blocks
from kv_policies.layout.view import LiveView
from tests.kv_policies.layout.sims import latent_layouts
from tests.support.layout_sim import step_of


def latent_blocks(layout: LatentLayout, n: list[int], c: list[int]) -> LatentBlocks:
    spans = layout.spans(layout.phase(np.array(n), np.array(c)))
    return LatentBlocks._make(field[0] for field in all_latent_blocks([layout], spans))


def test_picture_of_the_module_text() -> None:
    layout, n = LatentLayout(32, 160, 32, window=32, recent=32), 290
    assert layout.freed(n, n - 1) == []
    assert layout.freed(n, 319) == [(0, 6)]
    assert layout.freed(n, 383) == [(0, 6), (8, 9), (9, 10)]
    assert layout.freed(n, 384) == [(0, 6), (8, 9), (9, 10)]  # column 10 became the third block
    held = latent_blocks(layout, [n, n, n], [290, 352, 384])
    assert held.column.tolist() == [[6, 7, 6], [6, 7, 6], [6, 7, 10]]
    assert held.first.tolist() == [[0, 160, 0], [0, 160, 0], [0, 160, 320]]
    assert held.tokens.tolist() == [[160, 96, 0], [160, 160, 0], [160, 160, 32]]
    assert layout.cacheable(n, n) == 6 * 32


def test_short_prompts_stay_raw_and_what_is_generated_does_not() -> None:
    layout = LatentLayout(32, 160, 32, window=32, min_prompt=128, recent=32)
    assert layout.freed(100, 500) == [
        (first, first + 1) for first in [*range(5, 9), *range(10, 14)]
    ]
    held = latent_blocks(layout, [100], [500])
    assert held.column.tolist() == [[4, 9, 14][: held.column.shape[1]]]
    assert int(held.first[0, 0]) == 128 and int(held.tokens.sum()) == (500 - 32 - 128) // 32 * 32


def test_a_layout_of_no_latents_keeps_all_raw() -> None:
    layout = LatentLayout(32, 0, 32, window=32)
    step, table = step_of((290, 400, 1), (0, 0, 1)), torch.arange(26).view(2, 13)
    view, seen = LiveView(layout).update(step, table, torch.from_numpy(step.end))
    assert torch.equal(view, table) and seen.tolist() == [401, 1]
    assert latent_blocks(layout, [290, 0], [400, 0]).tokens.sum() == 0
    assert layout.gap(290) == 0 and layout.freed(290, 400) == []


def test_a_layout_of_no_latents_does_not_answer_for_one_that_has_some() -> None:
    """Layers of bases that save nothing lie beside others; a step asks once per timing."""
    step = step_of((290, 319, 1))
    assert not step.ending(LatentLayout(32, 0, 32, window=32))
    assert step.ending(LatentLayout(32, 160, 32, window=32))


def test_bad_arguments_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        LatentLayout(16, 8, 24, window=40, recent=-1)
    assert "5 problems" in str(caught.value)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 250), st.integers(0, 130), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(latent_layouts(), st.lists(REQUESTS, min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_a_batch_is_what_its_requests_are_alone(
    given_layout: tuple[LatentLayout, int], steps: list[list[tuple[int, int, int, bool]]]
) -> None:
    """Over steps that share the memory of what was planned before."""
    layout, bs = given_layout[0], given_layout[0].block_size
    views = LiveView(layout), LatentView(layout)
    most = max(a + b for requests in steps for _, a, b, _ in requests)
    width = -(-most // bs) + 1
    for requests in steps:
        step = step_of(*((0 if out else n, c, q) for n, c, q, out in requests))
        table = torch.randperm(len(requests) * width).view(len(requests), width).int()
        view, seen = views[0].update(step, table, torch.from_numpy(step.end), rows=6)
        reading = views[1].update(step, table, view)
        rows = iter(range(len(requests)))
        cut = False
        for row, (n, c, q, out) in enumerate(requests):
            segments = [] if out else list(layout.segments(n, c))
            covered = {at for segment in segments for at in range(segment.start, segment.stop)}
            raw = [column for column in range(-(-(c + q) // bs)) if column not in covered]
            assert view[row, : len(raw)].tolist() == table[row, raw].tolist()
            assert int(seen[row]) == c + q - len(covered) * bs
            if segments and q:
                assert reading is not None
                at = next(rows)
                of_row = zip(reading.blocks[at].tolist(), reading.contents.count[at], strict=True)
                columns = [at for segment in segments for at in range(*segment.destination)]
                assert [b for b, tokens in of_row if tokens] == table[row, columns].tolist()
                assert int(reading.contents.count[at].sum()) == len(covered) * bs
            elif segments:
                next(rows)
            cut |= not out and len(layout.substeps(n, c, q)) > 1
        assert (len(step.passes(layout)) > 1) == cut


def test_blocks_that_are_begun_are_cleared_of_requests_that_opted_out_too() -> None:
    """n = 0 is theirs, and that of rows that pad the batch, which have no tokens."""
    step = step_of((100, 20, 30), (0, 4, 3), (0, 0, 0), (100, 0, 16))
    blocks = fresh_blocks(LatentLayout(8, 16, 16), step, torch.arange(40).view(4, 10))
    assert blocks is not None and blocks.tolist() == [6]
    step = step_of((0, 8, 3), (0, 0, 0))
    blocks = fresh_blocks(LatentLayout(8, 16, 16), step, torch.arange(20).view(2, 10))
    assert blocks is not None and blocks.tolist() == [1]
