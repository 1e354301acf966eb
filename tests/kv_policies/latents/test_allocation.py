# SPDX-License-Identifier: Apache-2.0
"""Ranks are shared out within the bytes, in few sizes, and go where most is lost."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kv_policies.budget.levels import pick_levels
from kv_policies.latents.allocation import allocate, halves
from kv_policies.latents.bases_header import SIDES, Side, even_ranks, ratio_problem
from kv_policies.latents.format import BLOCK, Bits, LatentFormat
from kv_policies.latents.rounding import losses

BITS = st.sampled_from([4, 16])


def falling(features: int, slope: float, bits: Bits = 16) -> torch.Tensor:
    """Losses of energies that fall by this factor from latent to latent."""
    energies = slope ** torch.arange(features, dtype=torch.float64)
    error = 0.01 * float(energies.sqrt().sum()) ** 2 / features
    return losses(energies, {features: error} if bits == 4 else {})


def share(ranks: dict[Side, int], features: int, bits: Bits = 16) -> Fraction:
    """Blocks of 32 tokens that a token takes as a latent, times 32."""
    elements = 2 * BLOCK * features
    return Fraction(BLOCK, LatentFormat.most_tokens(elements, ranks["key"], ranks["value"], bits))


@given(
    st.integers(3, 12),
    st.integers(24, 64),
    st.fractions(Fraction(1, 4), Fraction(19, 20), max_denominator=20),
    BITS,
    st.data(),
)
@settings(deadline=None)
def test_bytes_are_those_of_the_ratio(
    layers: int, features: int, ratio: Fraction, bits: Bits, data: st.DataObject
) -> None:
    assume(ratio_problem(ratio, features, bits) is None)
    # In less room a number of 4 bits more or less changes the tokens of a block.
    assume(bits == 16 or ((1 - ratio) * 4 * features) ** 2 > 3 * features)
    slopes = st.floats(0.5, 1)
    given = {
        3 * layer: {side: falling(features, data.draw(slopes), bits) for side in SIDES}
        for layer in range(layers)
    }
    found = allocate(given, ratio, features, bits)
    assert list(sorted(found)) == list(given)
    assert all(1 <= rank <= features for ranks in found.values() for rank in ranks.values())
    tokens = {share(ranks, features, bits) for ranks in found.values()}
    assert len(tokens) <= pick_levels(layers)
    spent = sum(share(ranks, features, bits) for ranks in found.values())
    assert spent <= (1 - ratio) * layers
    # Nothing smaller than a step of the largest level is left over.
    full = LatentFormat.token_bytes(features, features, bits) / (4 * features)
    assert spent >= min(1 - ratio, full) * layers * Fraction(1, 2)


@given(st.integers(24, 64), st.floats(0.5, 1), st.floats(0.5, 1), BITS, st.data())
@settings(deadline=None)
def test_more_bytes_take_hardly_a_number_from_anyone(
    features: int, keys: float, values: float, bits: Bits, data: st.DataObject
) -> None:
    """In one level; with several a layer can change the level."""
    given = {0: {"key": falling(features, keys, bits), "value": falling(features, values, bits)}}
    ratios = st.fractions(Fraction(1, 4), Fraction(9, 10), max_denominator=50)
    found = []
    for ratio in sorted((data.draw(ratios), data.draw(ratios)), reverse=True):
        assume(ratio_problem(ratio, features, bits) is None)
        (ranks,) = allocate(given, ratio, features, bits).values()  # type: ignore[arg-type]
        found.append(ranks)
    # What the other side gets in any case grows with the bytes.
    grown = features // 4
    for side in SIDES:
        assert found[0][side] <= found[1][side] + grown


@pytest.mark.parametrize("bits", [4, 16])
def test_less_is_lost_than_by_halves_in_no_more_bytes(bits: Bits) -> None:
    features, ratio = 192, Fraction(43, 50) if bits == 4 else Fraction(4, 5)
    given = {
        layer: {
            "key": falling(features, 0.6, bits),
            "value": falling(features, 0.9 + layer / 150, bits),
        }
        for layer in range(12)
    }
    even, found = (choose(given, ratio, features, bits) for choose in (halves, allocate))

    def lost(ranks: dict[int, dict[Side, int]]) -> float:
        """The sum that ``allocate`` makes small."""
        shares = [
            given[layer][side][rank] for layer, of in ranks.items() for side, rank in of.items()
        ]
        return float(torch.stack(shares).pow(0.3).sum())

    assert lost(found) < lost(even)
    bytes_of = [sum(share(r, features, bits) for r in of.values()) for of in (found, even)]
    assert bytes_of[0] <= bytes_of[1]
    least = sum(even_ranks(ratio, features, bits)) // 4
    assert all(least <= ranks["key"] < ranks["value"] for ranks in found.values())


def test_equal_layers_get_the_same() -> None:
    given = {layer: dict.fromkeys(SIDES, falling(64, 0.9)) for layer in range(6)}
    even = halves(given, Fraction(3, 4), 64, 16)
    assert even == dict.fromkeys(range(6), {"key": 16, "value": 16})
    assert allocate(given, Fraction(3, 4), 64, 16) == even


def test_a_number_that_takes_fewer_bytes_comes_first() -> None:
    """Of keys and values that lose alike, in 4 bits values get more: they have no scale each."""
    given = {0: dict.fromkeys(SIDES, falling(64, 0.9, 4))}
    ranks = allocate(given, Fraction(17, 20), 64, 4)[0]
    assert ranks["key"] < ranks["value"]


def test_all_of_it() -> None:
    given = {layer: dict.fromkeys(SIDES, falling(16, 0.9)) for layer in range(3)}
    whole = dict.fromkeys(range(3), {"key": 16, "value": 16})
    assert allocate(given, Fraction(0), 16, 16) == whole
