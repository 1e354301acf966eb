# SPDX-License-Identifier: Apache-2.0
"""The pieces together, as an engine joins them: paged cache, scores, choice, packing, view."""

from fractions import Fraction

import pytest
import torch

from kv_policies.base import observed_queries
from kv_policies.layout import Layout, Segment
from kv_policies.registry import build_policy, policies
from kv_policies.select import pack, select, token_slots

BLOCK, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
LENGTHS = (43, 20, 9)  # prompts that end in one step: N % BLOCK is 3, 0 and 1


@pytest.mark.parametrize("keep", [Fraction(1, 4), Fraction(1, 2), Fraction(1)])
@pytest.mark.parametrize("name", sorted(policies()))
def test_compacted_cache_holds_the_chosen_tokens_in_order(name: str, keep: Fraction) -> None:
    torch.manual_seed(0)
    layout = Layout(BLOCK, keep)
    policy = build_policy(name, {"window": 4} if name == "snap_kv" else {})
    n = torch.tensor(LENGTHS)
    width = 12
    table = torch.randperm(len(LENGTHS) * width).view(len(LENGTHS), width).int()
    cache = torch.randn(len(LENGTHS) * width * BLOCK, KV_HEADS, DIM)  # [slots, heads, D]
    queries = torch.randn(len(LENGTHS), HEADS, int(n.max()), DIM)
    before = cache.clone()
    everything = torch.arange(width * BLOCK).expand(len(LENGTHS), -1)
    slots = token_slots(table, everything, BLOCK)
    keys = cache[slots].transpose(1, 2)  # [R, heads, T, D]; behind N it is other content

    batch = layout.ending_batch(n, torch.zeros_like(n), n)
    assert len(batch.row) == (0 if keep == 1 else len(LENGTHS))
    if len(batch.row):
        at = torch.arange(int(n.max())).expand(len(LENGTHS), -1).clone()
        for row, *segment in zip(*(x.tolist() for x in batch), strict=True):
            wanted = observed_queries(policy, Segment(*segment), layout.first_private(LENGTHS[row]))
            at[row, : wanted.start], at[row, wanted.stop :] = -1, -1
        observed = policy.observe(queries, at, keys, DIM**-0.5)
        scores = policy.score(observed, keys, n)
        kept = batch.kept * BLOCK
        chosen = select(scores, batch.stop * BLOCK, kept)
        packed = pack(keys, chosen)
        order = torch.arange(chosen.shape[-1])
        target = (batch.stop - batch.kept)[:, None] * BLOCK + order
        target = token_slots(table, torch.where(order < kept[:, None], target, -1), BLOCK)
        cache[target[target >= 0]] = packed.transpose(1, 2)[target >= 0]

    view, seq_lens = layout.view(table, n, n, torch.zeros_like(n))
    for row, length in enumerate(LENGTHS):
        segments = layout.ending(length, 0, length)
        full = length // BLOCK * BLOCK
        count = segments[0].kept * BLOCK if segments else full
        assert int(seq_lens[row]) == count + length - full
        content = cache[token_slots(view[row : row + 1], everything[:1, : seq_lens[row]], BLOCK)[0]]
        for head in range(KV_HEADS):
            raw = before[slots[row, :length], head]
            rows = [int((raw == token).all(-1).nonzero()) for token in content[:, head]]
            assert rows == sorted(set(rows)) and rows[0] == 0  # true positions, ascending
            assert rows[count:] == list(range(full, length))  # the raw tail
            if keep == 1:
                assert rows == list(range(length))
        # Freed columns were only read: they stay valid for the prefix cache.
        for first, stop in layout.freed(length, length):
            head_slots = slots[row, first * BLOCK : stop * BLOCK]
            assert torch.equal(cache[head_slots], before[head_slots])
