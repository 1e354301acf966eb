# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.select import pack, select


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = draw(st.lists(st.integers(2, 30), min_size=1, max_size=4))
    kept = [draw(st.integers(2, length)) for length in rows]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.randn(len(rows), draw(st.integers(1, 3)), max(rows) + 2, generator=generator)
    if draw(st.booleans()):  # many ties
        scores = scores.round()
    if draw(st.booleans()):
        noise = torch.rand(scores.shape, generator=generator)
        scores[noise < 0.1], scores[noise > 0.9] = torch.nan, -torch.inf
        scores[(noise > 0.5) & (noise < 0.6)] = torch.inf
    return scores, torch.tensor(rows), torch.tensor(kept)


@given(batches())
@settings(deadline=None)
def test_exact_count_ascending_ends_kept_and_best_of_the_rest(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, lengths, kept = batch
    chosen = select(scores, lengths, kept)
    assert chosen.shape == (*scores.shape[:2], int(kept.max()))
    least = torch.finfo(torch.float32)
    for row, (length, count) in enumerate(zip(lengths.tolist(), kept.tolist(), strict=True)):
        for head in range(scores.shape[1]):
            tokens = chosen[row, head].tolist()
            assert tokens[count:] == [-1] * (len(tokens) - count)
            tokens = tokens[:count]
            assert tokens == sorted(set(tokens)) and tokens[0] == 0 and tokens[-1] == length - 1
            value = scores[row, head].nan_to_num(least.min, least.max, least.min).tolist()
            inner = sorted(range(1, length - 1), key=lambda token: (-value[token], token))
            assert sorted(inner[: count - 2]) == tokens[1:-1]
    # The choice of a request is the same alone and in company.
    alone = select(scores[-1:, :, : lengths[-1]], lengths[-1:], kept[-1:], most=int(kept.max()))
    assert torch.equal(alone[..., : int(kept[-1])], chosen[-1:, :, : int(kept[-1])])


@given(batches())
@settings(deadline=None)
def test_keeping_everything_keeps_the_order(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, lengths, _ = batch
    chosen = select(scores, lengths, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert (chosen[row, :, :length] == torch.arange(length)).all()


def test_padding_rows_keep_nothing() -> None:
    chosen = select(torch.ones(2, 1, 4), torch.tensor([0, 4]), torch.tensor([0, 2]))
    assert chosen.tolist() == [[[-1, -1]], [[0, 3]]]


def test_pack_finds_the_chosen_tokens() -> None:
    chosen = torch.tensor([[[0, 5, 11], [2, 3, -1]], [[0, 1, 4], [8, 9, 10]]])
    content = torch.randn(2, 2, 12, 3)  # [R, heads, T, D]
    packed = pack(content, chosen)
    for row, head, i in (chosen >= 0).nonzero().tolist():
        assert torch.equal(packed[row, head, i], content[row, head, chosen[row, head, i]])
    shared = pack(content, chosen[:, :1])
    assert torch.equal(shared[:, 1, 1], content[torch.arange(2), 1, chosen[:, 0, 1]])
