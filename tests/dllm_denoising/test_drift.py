# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dllm_denoising import drift
from dllm_denoising.drift import Over, Total, attention_mass, cosines, probabilities

HEADS, KV_HEADS, DIM = 4, 2, 8
SCALE = DIM**-0.5
OVER = get_args(Over)


def attention(
    rows: int, keys: int, requests: int = 1, seed: int = 0, sharp: float = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(requests, HEADS, rows, DIM, generator=generator) * sharp
    return queries, torch.randn(requests, KV_HEADS, keys, DIM, generator=generator) * sharp


def similarity(
    past: torch.Tensor,
    current: torch.Tensor,
    rows: torch.Tensor,
    there: torch.Tensor,
    over: Over,
    total: Total = lambda part: part,
) -> torch.Tensor:
    found = cosines(past, current, rows, there, over, total)
    return drift.similarity(found, rows, there, over, HEADS)


def most_attended(
    current: torch.Tensor,
    rows: torch.Tensor,
    candidates: torch.Tensor,
    count: int,
    total: Total = lambda part: part,
) -> torch.Tensor:
    return drift.most_attended(total(attention_mass(current, rows)), candidates, count)


def all_of(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def dense(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[R, Hq, T, N] in float64, written the plain way."""
    keys = keys.double().repeat_interleave(HEADS // KV_HEADS, dim=1)
    return (queries.double() @ keys.transpose(-1, -2) * SCALE).softmax(-1)


def drifted(rows: int, keys: int, **how: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities before and after a small change of everything."""
    q, k = attention(rows, keys, **how)
    dq, dk = attention(rows, keys, seed=99, sharp=0.4)
    there = all_of(1, keys)
    return probabilities(q, k, SCALE, there), probabilities(q + dq, k + dk, SCALE, there)


def halves(call: Callable[[slice, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]) -> None:
    """Assert that two ranks with half of the heads each give what one with all gives."""
    parts: list[torch.Tensor] = []

    def first(part: torch.Tensor) -> torch.Tensor:
        parts.append(part.clone())
        return part

    call(slice(0, HEADS // 2), first)
    assert len(parts) == 1  # one reduction
    got = call(slice(HEADS // 2, HEADS), lambda part: part + parts[0])
    torch.testing.assert_close(got, call(slice(0, HEADS), lambda part: part))


def test_probabilities_against_the_dense_reference() -> None:
    queries, keys = attention(5, 20, requests=2)
    got = probabilities(queries.bfloat16(), keys.bfloat16(), SCALE, all_of(2, 20))
    assert got.dtype == torch.float32
    want = dense(queries.bfloat16(), keys.bfloat16())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sharp", [0.5, 2, 6])
def test_similarity_over_heads_is_that_of_the_published_code(sharp: float) -> None:
    past, current = drifted(3, 40, sharp=sharp)
    got = similarity(past, current, all_of(1, 3), all_of(1, 40), "heads")
    want = cosine_similarity(past, current, dim=1).mean()
    assert got.shape == (1,) and got.item() == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("sharp", [0.5, 2, 6])
def test_similarity_over_a_row_is_that_of_the_text(sharp: float) -> None:
    past, current = drifted(3, 40, sharp=sharp)
    got = similarity(past, current, all_of(1, 3), all_of(1, 40), "row")
    want = cosine_similarity(past, current, dim=-1).mean()
    assert got.item() == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("far", [0.1, 1e-5])
def test_identical_attention_gives_one(over: Over, far: float) -> None:
    """However little of it most keys get: in long texts nearly all get less than 1e-4."""
    same = torch.full((1, HEADS, 2, 9), far)
    same[..., 0] = 1 - 8 * far
    got = similarity(same, same, all_of(1, 2), all_of(1, 9), over)
    assert got.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("over", "want"), [("row", 1), ("heads", 1 / 9)])
def test_keys_that_no_head_attends_to_are_drift_over_heads(over: Over, want: float) -> None:
    """The published code's cosine has a floor of 1e-8 for each norm: why rows are the default."""
    same = torch.full((1, HEADS, 2, 9), 1e-12)
    same[..., 0] = 1
    got = similarity(same, same, all_of(1, 2), all_of(1, 9), over)
    assert got.item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("over", OVER)
def test_other_attention_gives_zero(over: Over) -> None:
    past, current = torch.eye(2).expand(1, HEADS, 2, 2), torch.eye(2).flip(0)[None, None]
    got = similarity(past, current.expand_as(past), all_of(1, 2), all_of(1, 2), over)
    assert got.item() == 0


@pytest.mark.parametrize("over", OVER)
def test_nothing_tracked_is_not_a_number(over: Over) -> None:
    past, current = drifted(3, 7)
    assert similarity(past, current, ~all_of(1, 3), all_of(1, 7), over).isnan().all()
    none = torch.zeros(1, HEADS, 0, 7)
    assert similarity(none, none, all_of(1, 0), all_of(1, 7), over).isnan().all()


@pytest.mark.parametrize("rest", [0.0, 5.0, torch.nan])
@pytest.mark.parametrize("over", OVER)
def test_padding_changes_nothing(over: Over, rest: float) -> None:
    """Requests of several sizes in one batch; what lies behind their ends may be anything."""
    sizes = [(2, 11), (4, 20), (1, 5)]
    rows = torch.arange(4) < torch.tensor([t for t, _ in sizes])[:, None]
    there = torch.arange(20) < torch.tensor([n for _, n in sizes])[:, None]
    candidates = there & (torch.arange(20) % 3 == 0)
    q, k = attention(4, 20, requests=3)
    later_q, later_k = (part + 0.3 for part in attention(4, 20, requests=3, seed=1))
    for queries, keys in ((q, k), (later_q, later_k)):
        queries.masked_fill_(~rows[:, None, :, None], rest)
        keys.masked_fill_(~there[:, None, :, None], rest)
    past, current = probabilities(q, k, SCALE, there), probabilities(later_q, later_k, SCALE, there)
    got = similarity(past, current, rows, there, over)
    places = most_attended(current, rows, candidates, 8)
    for r, (t, n) in enumerate(sizes):
        mine = slice(r, r + 1), slice(None)
        past, current = (
            probabilities(queries[*mine, :t], keys[*mine, :n], SCALE, there[mine][:, :n])
            for queries, keys in ((q, k), (later_q, later_k))
        )
        alone = similarity(past, current, all_of(1, t), all_of(1, n), over)
        torch.testing.assert_close(got[mine[0]], alone)
        best = most_attended(current, all_of(1, t), candidates[mine][:, :n], 8)
        assert places[r].tolist() == best[0].tolist()


@pytest.mark.parametrize("over", OVER)
def test_heads_on_two_ranks(over: Over) -> None:
    past, current = drifted(3, 40)
    rows, there = torch.tensor([[True, False, True]]), all_of(1, 40)
    halves(lambda h, total: similarity(past[:, h], current[:, h], rows, there, over, total))
    halves(lambda h, total: most_attended(current[:, h], rows, there, 3, total))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_most_attended_are_the_heaviest_candidates(count: int) -> None:
    """Never one that is masked or padding, however much attention it gets."""
    queries, keys = attention(5, 30, requests=40)
    there = torch.arange(30) < torch.randint(6, 31, (40, 1))
    candidates = there & (torch.rand(40, 30) < 0.5)
    candidates[0] = False
    rows = torch.rand(40, 5) < 0.7
    current = probabilities(queries, keys, SCALE, there)
    got = most_attended(current, rows, candidates, count)
    assert got.dtype == torch.int64 and got.shape == (40, count)
    mass = (current * rows[:, None, :, None]).sum((1, 2))
    for r in range(40):
        free = candidates[r].nonzero()[:, 0].tolist()
        best = sorted(free, key=lambda place: -mass[r, place].item())[:count]
        found = [place for place in got[r].tolist() if place >= 0]
        assert set(found) <= set(free) and len(found) == len(set(found)) == len(best)
        assert got[r, len(found) :].tolist() == [-1] * (count - len(found))
        torch.testing.assert_close(mass[r, found], mass[r, best])


def test_fewer_keys_than_wanted() -> None:
    got = most_attended(torch.full((1, HEADS, 1, 2), 0.5), all_of(1, 1), all_of(1, 2), 4)
    assert sorted(got[0].tolist()) == [-1, -1, 0, 1]
