# SPDX-License-Identifier: Apache-2.0
"""Latents from raw blocks and back through attention, against attention written the plain way."""

import numpy as np
import pytest
import torch

from kv_policies.compaction import ALL
from kv_policies.latents import cache as cache_module
from kv_policies.latents import packing as packing_module
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.fixed import FixedView
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import LatentView
from kv_policies.latents.rope import Rope
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step
from kv_policies.layout.view import LiveView
from kv_policies.workspace import LIMIT
from tests.kv_policies.latents.test_rope import table as rope_table

BLOCK, KV_HEADS, DIM, GROUPED = 4, 2, 16, 3
HEADS, F = KV_HEADS * GROUPED, KV_HEADS * DIM
LENGTHS = np.array([70, 41, 9])
COLUMNS = 40


class DensePages:
    """K and V of one layer, a block being one piece of memory: K of all heads, then V."""

    def __init__(self, blocks: int) -> None:
        self.cache = torch.full((blocks, 2 * F * BLOCK), torch.nan)

    def view(self, part: int) -> torch.Tensor:
        return self.cache.view(-1, 2, KV_HEADS, BLOCK, DIM)[:, part]

    def keys(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self.view(0)[blocks, heads].transpose(1, 2).flatten(2, 3)

    def values(self, blocks: torch.Tensor, heads: slice = ALL) -> torch.Tensor:
        return self.view(1)[blocks, heads].transpose(1, 2).flatten(2, 3)

    def write_keys(self, *_: object) -> None:
        raise AssertionError("latents are not written as keys and values")

    write_values = write_keys


def factor(rank: int) -> Factor:
    basis = torch.linalg.qr(torch.randn(F, F))[0][:, :rank]
    return Factor(basis, basis.T.contiguous(), torch.randn(F) / 4)


def plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query [Hq, D] over [T, F]."""
    k = keys.view(-1, KV_HEADS, DIM).repeat_interleave(GROUPED, 1).double()
    v = values.view(-1, KV_HEADS, DIM).repeat_interleave(GROUPED, 1).double()
    weights = (torch.einsum("hd,thd->ht", query.double(), k) * scale).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, v)


@pytest.mark.parametrize(("key_rank", "value_rank"), [(5, 9), (6, 8)])
@pytest.mark.parametrize("window", [0, 16, 48])
@pytest.mark.parametrize("limit", [1, LIMIT])
def test_attention_reads_projections_of_old_tokens_and_recent_ones_as_they_are(
    monkeypatch: pytest.MonkeyPatch, key_rank: int, value_rank: int, window: int, limit: int
) -> None:
    """Also where memory allows one request and one piece at a time."""
    torch.manual_seed(0)
    for module in (cache_module, packing_module):
        monkeypatch.setattr(module, "LIMIT", limit)
    tokens = LatentFormat.most_tokens(2 * F * BLOCK, key_rank, value_rank, 16)
    layout = LatentLayout(BLOCK, tokens, 16, window=window, recent=BLOCK)
    rope, pages = Rope(rope_table(400, DIM)), DensePages(3 * COLUMNS)
    of_keys, of_values = factor(key_rank), factor(value_rank)
    form = LatentFormat(key_rank, value_rank, 16, tokens)
    cache = LatentCache(pages.cache, form, of_keys, of_values, rope)
    table = torch.randperm(3 * COLUMNS).view(3, COLUMNS).int()
    keys, values = torch.randn(2, 3, COLUMNS * BLOCK, F)
    positions = torch.arange(COLUMNS * BLOCK)
    turned = rope.rotate(keys.view(-1, KV_HEADS, DIM), positions.repeat(3)).view(keys.shape)

    live, held, fixed = LiveView(layout), LatentView(layout), FixedView(layout)
    c = np.zeros(3, np.int64)
    # Prompts in two chunks, then a few tokens at a time.
    for q in [
        np.array([40, 30, 9]),
        np.array([30, 11, 3]),
        *[np.array([2, 1, 1])] * 15,
        *[np.array([1, 1, 1])] * 15,
    ]:
        ends = (c + q).tolist()
        for row, end in enumerate(ends):
            for position in range(int(c[row]), end):
                block, at = int(table[row, position // BLOCK]), position % BLOCK
                for part, content in enumerate((turned, values)):
                    pages.view(part)[block, :, at] = content[row, position].view(KV_HEADS, DIM)
        starts = q.cumsum() - q
        step = Step(LENGTHS, c, q, starts, ["a", "b", "c"])
        view, seen = live.update(step, table, torch.from_numpy(step.end))
        reading = held.update(step, table, view)
        query = torch.randn(int(q.sum()), HEADS, DIM)
        output = torch.zeros_like(query)
        if reading is not None:
            cache.attend(reading, pages, query, DIM**-0.5, output)
        of_graph = None
        if (q == 1).all():  # over all columns, where kernels skip what there is not of them
            clean, of_graph = DensePages(0), torch.zeros_like(query)
            clean.cache = pages.cache.nan_to_num(0)
            whole = fixed.update(step, table, view, seen, rows=4)
            wide = LatentCache(clean.cache, form, of_keys, of_values, rope)
            wide.attend(whole, clean, query, DIM**-0.5, of_graph)
        for row, end in enumerate(ends):
            n = int(LENGTHS[row])
            old = sorted(
                position
                for segment in layout.segments(n, int(c[row]))
                for position in range(segment.start * BLOCK, segment.stop * BLOCK)
            )
            for position in range(int(c[row]), end if old or of_graph is not None else 0):
                seen_keys, seen_values = keys[row].clone(), values[row].clone()
                seen_keys[old] = of_keys.project(seen_keys[old])
                seen_values[old] = of_values.project(seen_values[old])
                seen_keys = rope.rotate(seen_keys.view(-1, KV_HEADS, DIM), positions).flatten(1)
                at = int(starts[row]) + position - int(c[row])
                stop = position + 1
                want = plain(query[at], seen_keys[:stop], seen_values[:stop], DIM**-0.5)
                for found in ([output] if old else []) + ([] if of_graph is None else [of_graph]):
                    torch.testing.assert_close(found[at].double(), want, atol=2e-5, rtol=1e-4)
        packings = Packer([(layout, form)]).work(layout, step, table)
        if packings is not None:
            cache.pack(packings.parts, pages)
        for row, end in enumerate(ends):  # freed blocks belong to somebody else at once
            for first, stop in layout.freed(int(LENGTHS[row]), end):
                pages.cache[table[row, first:stop].long()] = torch.nan
        c = c + q
    assert any(layout.freed(int(n), int(at)) for n, at in zip(LENGTHS, c, strict=True))
