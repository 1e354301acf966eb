# SPDX-License-Identifier: Apache-2.0
"""Raw tokens and latents together are all tokens, each once and in order."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.latent_layout import latent_blocks, raw_columns
from kv_policies.layout import Layout


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout, and the tokens that a latent block holds."""
    block_size = draw(st.integers(2, 8))
    tokens = block_size + draw(st.integers(1, 40))
    layout = Layout(
        block_size,
        Fraction(block_size, tokens),
        window=block_size * draw(st.integers(0, 5)),
        min_blocks=draw(st.integers(1, 3)),
        min_prompt=block_size * draw(st.integers(0, 6)),
        recent=block_size * draw(st.integers(0, 2)),
    )
    return layout, tokens


REQUESTS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 250), st.booleans()), min_size=1, max_size=6
)


@given(layouts(), REQUESTS)
@settings(deadline=None, max_examples=300)
def test_every_token_is_read_once(
    given_layout: tuple[Layout, int], requests: list[tuple[int, int, bool]]
) -> None:
    layout, tokens = given_layout
    bs, width = layout.block_size, 180
    n, c, out = (torch.tensor(column) for column in zip(*requests, strict=True))
    held = latent_blocks(layout, n, c, tokens, out)
    columns, hidden = raw_columns(layout, n, c, width, out)
    for row, (length, computed, opted_out) in enumerate(requests):
        its = layout.opted_out() if opted_out else layout
        segments = list(its.segments(length, computed))
        destinations = {col for segment in segments for col in range(*segment.destination)}
        covered = {col for segment in segments for col in range(segment.start, segment.stop)}
        raw = [column for column in range(-(-computed // bs)) if column not in covered]
        assert columns[row, : len(raw)].tolist() == raw
        assert int(hidden[row]) == len(covered) * bs
        seen = []
        for column, first, count in zip(*(field[row].tolist() for field in held), strict=True):
            if count:
                assert column in destinations and count <= tokens
                seen += range(first, first + count)
        assert seen == [col * bs + offset for col in sorted(covered) for offset in range(bs)]
