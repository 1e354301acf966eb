# SPDX-License-Identifier: Apache-2.0
"""Ranks are shared out within the bytes, in few sizes, and go where energy is left."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_policies.budget.levels import pick_levels
from kv_policies.latents.allocation import allocate, halves
from kv_policies.latents.bases_header import SIDES, Side, total_rank
from kv_policies.latents.format import LatentFormat


def falling(features: int, slope: float) -> torch.Tensor:
    """Energies that fall by this factor from latent to latent."""
    return slope ** torch.arange(features, dtype=torch.float64)


def share(ranks: dict[Side, int], features: int) -> Fraction:
    """Blocks of 32 tokens that a token takes as a latent, times 32."""
    tokens = LatentFormat.most_tokens(64 * features, ranks["key"], ranks["value"], 16)
    return Fraction(32, tokens)


@given(
    st.integers(3, 12),
    st.integers(24, 64),
    st.fractions(Fraction(1, 4), Fraction(19, 20), max_denominator=20),
    st.data(),
)
@settings(deadline=None)
def test_bytes_are_those_of_the_ratio(
    layers: int, features: int, ratio: Fraction, data: st.DataObject
) -> None:
    slopes = st.floats(0.5, 1)
    energies = {
        3 * layer: {side: falling(features, data.draw(slopes)) for side in SIDES}
        for layer in range(layers)
    }
    found = allocate(energies, ratio, features)
    assert list(sorted(found)) == list(energies)
    assert all(1 <= rank <= features for ranks in found.values() for rank in ranks.values())
    totals = {sum(ranks.values()) for ranks in found.values()}
    assert len(totals) <= pick_levels(layers)
    spent = sum(share(ranks, features) for ranks in found.values())
    assert spent <= (1 - ratio) * layers
    # Nothing smaller than a step of the largest level is left over.
    assert spent >= (1 - ratio) * layers * Fraction(3, 5)


def test_less_is_lost_than_by_halves_in_no_more_bytes() -> None:
    features = 192
    energies = {
        layer: {"key": falling(features, 0.6), "value": falling(features, 0.9 + layer / 150)}
        for layer in range(12)
    }
    even, found = (choose(energies, Fraction(4, 5), features) for choose in (halves, allocate))

    def lost(ranks: dict[int, dict[Side, int]]) -> float:
        """The sum that the shares of energy are taken to the power for."""
        shares = [
            energies[layer][side][rank:].sum() / energies[layer][side].sum()
            for layer, of_layer in ranks.items()
            for side, rank in of_layer.items()
        ]
        return float(torch.stack(shares).pow(0.3).sum())

    assert lost(found) < lost(even)
    bytes_of = [sum(share(r, features) for r in of.values()) for of in (found, even)]
    assert bytes_of[0] <= bytes_of[1]
    assert all(9 <= ranks["key"] < ranks["value"] for ranks in found.values())


def test_equal_layers_get_the_same() -> None:
    energies = {layer: dict.fromkeys(SIDES, falling(64, 0.9)) for layer in range(6)}
    even = halves(energies, Fraction(3, 4), 64)
    assert allocate(energies, Fraction(3, 4), 64) == even
    assert sum(even[0].values()) == total_rank(Fraction(3, 4), 64)


def test_all_of_it() -> None:
    energies = {layer: dict.fromkeys(SIDES, falling(16, 0.9)) for layer in range(3)}
    assert allocate(energies, Fraction(0), 16) == dict.fromkeys(range(3), {"key": 16, "value": 16})
