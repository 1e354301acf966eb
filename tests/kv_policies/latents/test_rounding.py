# SPDX-License-Identifier: Apache-2.0
"""Bases that are mixed for 4 bits: the same keys and values, less error by rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.latents.bases_header import SIDES, Side
from kv_policies.latents.format import GROUP, LatentFormat
from kv_policies.latents.low_rank import Factor, closed_form, moments, relative_error
from kv_policies.latents.rounding import (
    cosines,
    losses,
    restored,
    rounding_error,
    spread,
    stored,
)

TOKENS, F = 64 * GROUP, 24
SEEDS = st.integers(0, 999)


def states(seed: int, slope: float = 0.7) -> torch.Tensor:
    """[TOKENS, F] whose principal components fall by ``slope``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, F, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(F, F, generator=generator, dtype=torch.float64)).Q
    return x * slope ** torch.arange(F) @ turn + torch.randn(F, generator=generator)


@given(SEEDS, st.integers(1, F))
@settings(deadline=None, max_examples=30)
def test_what_is_restored_is_the_same(seed: int, rank: int) -> None:
    x = states(seed)
    full, energies = closed_form(*moments(x))
    plain, mixed = full.cut(rank), spread(full.cut(rank), energies[:rank])
    torch.testing.assert_close(mixed.project(x), plain.project(x))
    torch.testing.assert_close(mixed.decode @ mixed.encode, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [8, F])
def test_rounding_loses_less_and_losses_say_how_much(side: Side, rank: int) -> None:
    x = states(1)
    full, energies = closed_form(*moments(x))
    plain = full.cut(rank)
    mixed = spread(plain, energies[:rank])
    assert rounding_error(mixed, x, side) < 0.7 * rounding_error(plain, x, side)

    def error(at: int) -> float:
        return rounding_error(spread(full.cut(at), energies[:at]), x, side)

    told = losses(energies, {at: error(at) for at in (4, 12, F)})
    found = relative_error(x, restored(mixed, x, side, 4))
    assert float(told[rank]) == pytest.approx(found, rel=0.2)
    exact = losses(energies, {})
    assert exact[0] == 1 and exact[F] == 0 and bool((told[1:] > exact[1:]).all())
    assert relative_error(x, restored(plain, x, side, 16)) == pytest.approx(float(exact[rank]))


def test_stored_is_what_a_cache_returns() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2 * GROUP, rank, generator=generator) for rank in (5, 7))
    form = LatentFormat(5, 7, 4, 2 * GROUP)
    cache = torch.zeros(1, form.bytes(4))
    content = form.encode(*(x.unflatten(0, (-1, form.unit)) for x in (keys, values)), torch.float32)
    form.write(cache, torch.zeros(2, dtype=torch.int64), torch.arange(2), content)
    for x, side, read in zip(
        (keys, values), SIDES, form.read(cache, torch.zeros(1, dtype=torch.int64)), strict=True
    ):
        torch.testing.assert_close(stored(x, side), read[0])


def test_tokens_behind_the_last_group_are_restored_too() -> None:
    x = states(2)[: GROUP + 5]
    factor = Factor(*(torch.eye(F, dtype=torch.float64),) * 2, torch.zeros(F).double())
    found = restored(factor, x, "key", 4)
    assert torch.equal(found[GROUP:], x[GROUP:]) and not torch.equal(found[:GROUP], x[:GROUP])


@given(st.integers(1, 300))
@settings(deadline=None)
def test_cosines_turn(size: int) -> None:
    matrix = cosines(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
