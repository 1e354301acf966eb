# SPDX-License-Identifier: Apache-2.0
"""How many latents each layer gives to its keys and to its values, within the same bytes in all.

Layers whose latents take equal room share a block table, so the totals of the layers are cut into
few *levels* of (nearly) equal layer count. A block holds whole units of tokens, so not every total
fills a block. Levels have totals that do.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Final

import torch

from kv_policies.budget.levels import quantize
from kv_policies.latents.bases_header import SIDES, Side, total_rank
from kv_policies.latents.format import LatentFormat

Ranks = dict[Side, int]
Energies = Mapping[Side, torch.Tensor]

_POWER: Final = 0.3
_FLOOR: Final = 8  # no side of a layer gets less than this part of the layers' mean total
# Of the ratio's bytes. Levels meet the ends of blocks at different lengths: in the worst moment of
# a full pool, requests with several totals hold that much more than those with one. Not where a
# block holds few tokens: there the next smaller total is too much smaller.
_PART: Final = Fraction(24, 25)
_FEW: Final = 128  # tokens
_BLOCK: Final = 32  # tokens: what fills such a block fills those of 64, 128, ... too
_UNIT: Final = LatentFormat(1, 1, 16, 0).unit


def halves(layers: Iterable[int], ratio: Fraction, features: int) -> dict[int, Ranks]:
    """As many latents for keys as for values, the same in every layer.

    Args:
        layers: Indices in the model.
        ratio: Share of the cache's numbers that is saved.
        features: F.
    """
    total = total_rank(ratio, features)
    return {layer: {"key": total // 2, "value": total - total // 2} for layer in layers}


def allocate(energies: Mapping[int, Energies], ratio: Fraction, features: int) -> dict[int, Ranks]:
    """Ranks by what latents are worth, within the bytes of ``halves`` or a little less.

    A latent is worth its energy over the energy that would be lost without it and all that follow,
    to the power 0.7. That is between the share of all energy and the share of what is left. The
    former gives keys almost nothing, because a few directions hold nearly all of their energy.

    Args:
        energies: Of each layer's latents, [F] for keys and for values, descending.
        ratio: Share of the cache's numbers that is saved.
        features: F.
    """
    layers = sorted(energies)
    total_each = total_rank(ratio, features)
    worth = {layer: _Worth(energies[layer], max(1, total_each // _FLOOR)) for layer in layers}
    wanted = _best(worth, total_each * len(layers))
    cut = quantize([Fraction(wanted[layer], 2 * features) for layer in layers])
    runs = [
        [layer for layer, of in zip(layers, cut.level_of, strict=True) if of == level]
        for level in range(len(cut.fractions))
    ]
    # Tokens that a block holds, rounded up: what is left of the bytes is given out step by step.
    held = [-(-_BLOCK // (share * _UNIT)) * _UNIT for share in cut.fractions]
    few = 2 * features * _BLOCK // total_each <= _FEW
    budget = (1 if few else _PART) * (1 - ratio) * len(layers) / _BLOCK

    def total(tokens: int) -> int:
        return min(2 * features, 2 * features * _BLOCK // tokens)

    while True:
        spent = sum(Fraction(len(run), tokens) for run, tokens in zip(runs, held, strict=True))
        steps = []
        for level, (run, tokens) in enumerate(zip(runs, held, strict=True)):
            cost = Fraction(len(run), max(1, tokens - _UNIT)) - Fraction(len(run), tokens)
            if tokens - _UNIT >= _BLOCK and spent + cost <= budget:
                more = slice(total(tokens), total(tokens - _UNIT))
                gain = sum(worth[layer].gains[more].sum().item() for layer in run)
                steps.append((gain / float(cost), level))
        if not steps:
            break
        held[max(steps)[1]] -= _UNIT
    return {
        layer: worth[layer].ranks(total(tokens))
        for run, tokens in zip(runs, held, strict=True)
        for layer in run
    }


class _Worth:
    """What the latents of a layer are worth, best first, and whose they are.

    least: latents that keys and values have in any case.
    """

    def __init__(self, energies: Energies, least: int) -> None:
        gains = torch.stack([_gains(energies[side], least) for side in SIDES])
        self.gains, order = gains.flatten().sort(descending=True, stable=True)
        self._keys = (order < gains.shape[1]).cumsum(0)

    def ranks(self, total: int) -> Ranks:
        keys = int(self._keys[total - 1])
        return {"key": keys, "value": total - keys}


def _gains(energies: torch.Tensor, least: int) -> torch.Tensor:
    """Never rising, so that the first of a side come first."""
    energies = energies.double()
    left = energies.flip(0).cumsum(0).flip(0)
    gains = energies / energies.sum() * (left / left[0]).clamp(min=1e-12) ** (_POWER - 1)
    gains = gains.cummin(0).values
    gains[:least] = torch.inf
    return gains


def _best(worth: Mapping[int, _Worth], count: int) -> dict[int, int]:
    """How many of the ``count`` best latents are of each layer."""
    layers: Sequence[int] = list(worth)
    gains = torch.stack([worth[layer].gains for layer in layers])
    best = gains.flatten().sort(descending=True, stable=True).indices[:count]
    counts = torch.bincount(best // gains.shape[1], minlength=len(layers))
    return dict(zip(layers, counts.tolist(), strict=True))
