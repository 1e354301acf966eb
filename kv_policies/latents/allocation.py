# SPDX-License-Identifier: Apache-2.0
"""How many latents each layer gives to its keys and to its values, within the same bytes in all.

Layers whose latents take equal room share a block table, so the bytes of the layers are cut into
few *levels* of (nearly) equal layer count. A block holds whole units of tokens, so not every number
of bytes fills a block. Levels have room that does.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Final

import torch

from kv_policies.budget.levels import quantize
from kv_policies.latents.bases_header import SIDES, Side, even_ranks, token_room
from kv_policies.latents.format import BLOCK, Bits, LatentFormat

Ranks = dict[Side, int]
Losses = Mapping[Side, torch.Tensor]

_POWER: Final = 0.3
_FLOOR: Final = 4  # no side of a layer gets less than this part of the layers' mean rank
# Of the ratio's bytes. Levels meet the ends of blocks at different lengths: in the worst moment of
# a full pool, requests with several totals hold that much more than those with one. Not where a
# block holds few tokens: there the next smaller total is too much smaller.
_PART: Final = Fraction(24, 25)
_FEW: Final = 128  # tokens


def halves(layers: Iterable[int], ratio: Fraction, features: int, bits: Bits) -> dict[int, Ranks]:
    """As many latents for keys as for values, the same in every layer.

    Args:
        layers: Indices in the model.
        ratio: Share of the cache's bytes that is saved.
        features: F.
        bits: Of a number of a latent.
    """
    key, value = even_ranks(ratio, features, bits)
    return {layer: {"key": key, "value": value} for layer in layers}


def allocate(
    losses: Mapping[int, Losses], ratio: Fraction, features: int, bits: Bits
) -> dict[int, Ranks]:
    """Ranks that lose little, within the bytes of the ratio or a little less.

    What the model loses is taken to be the sum of the losses to the power 0.3. That is between
    losses themselves and their logarithms. By the former keys would get almost nothing, because a
    few directions hold nearly all of their energy. Numbers are given out by what they gain per
    byte, and a key's number takes more bytes than a value's in 4 bits.

    Args:
        losses: Of each layer, for keys and for values: the share of energy that is lost with the
            first 0, 1, .. F latents, [F + 1]. What rounding loses is in it.
        ratio: Share of the cache's bytes that is saved.
        features: F.
        bits: Of a number of a latent.
    """
    layers = sorted(losses)
    room_each = token_room(ratio, features)
    least = max(1, sum(even_ranks(ratio, features, bits)) // _FLOOR)
    worth = {layer: _Worth(losses[layer], least, bits) for layer in layers}
    wanted = _best(worth, room_each * len(layers))
    whole, unit = token_room(Fraction(0), features), LatentFormat(1, 1, bits, 0).unit
    cut = quantize([wanted[layer] / whole for layer in layers])
    runs = [
        [layer for layer, level in zip(layers, cut.level_of, strict=True) if level == at]
        for at in range(len(cut.fractions))
    ]
    # Tokens that a block holds, rounded up: what is left of the bytes is given out step by step.
    tokens = [-(-BLOCK // (share * unit)) * unit for share in cut.fractions]
    few = BLOCK * whole / room_each <= _FEW
    budget = (1 if few else _PART) * (1 - ratio) * len(layers) / BLOCK
    while True:
        spent = sum(Fraction(len(run), each) for run, each in zip(runs, tokens, strict=True))
        steps = []
        for level, (run, each) in enumerate(zip(runs, tokens, strict=True)):
            cost = Fraction(len(run), max(1, each - unit)) - Fraction(len(run), each)
            if each - unit >= BLOCK and spent + cost <= budget:
                before, after = whole * BLOCK / each, whole * BLOCK / (each - unit)
                gain = sum(worth[layer].gain(before, after) for layer in run)
                steps.append((gain / float(cost), level))
        if not steps or max(steps)[0] <= 0:
            break
        tokens[max(steps)[1]] -= unit
    return {
        layer: worth[layer].ranks(whole * BLOCK / each)
        for run, each in zip(runs, tokens, strict=True)
        for layer in run
    }


class _Worth:
    """What the latents of a layer are worth, best per byte first, and whose they are.

    Args:
        losses: See ``allocate``.
        least: Latents that keys and values have in any case.
        bits: Of a number of a latent.

    Attributes:
        token: Bytes that a token takes without a number.
        per_byte: What each latent is worth by its bytes, [2 * F], descending.
        costs: Its bytes, [2 * F].
    """

    def __init__(self, losses: Losses, least: int, bits: Bits) -> None:
        self.token = LatentFormat.token_bytes(0, 0, bits)
        costs = [LatentFormat.token_bytes(*one, bits) - self.token for one in ((1, 0), (0, 1))]
        gains = [_gains(losses[side], least) for side in SIDES]
        per_byte = torch.cat([of / float(cost) for of, cost in zip(gains, costs, strict=True)])
        self.per_byte, order = per_byte.sort(descending=True, stable=True)
        key = order < len(gains[0])
        self.costs = torch.where(key, *map(float, costs)).double()
        self._gains, self._keys = torch.cat(gains)[order], key.cumsum(0)
        self._ends = self.costs.cumsum(0) + float(self.token)

    def ranks(self, room: Fraction) -> Ranks:
        """The best latents that fit ``room`` bytes, one for keys and one for values at least."""
        count = self._count(room)
        keys = int(self._keys[count - 1])
        return {"key": keys, "value": count - keys}

    def gain(self, before: Fraction, after: Fraction) -> float:
        """What a layer gains where its room grows."""
        return float(self._gains[self._count(before) : self._count(after)].sum())

    def _count(self, room: Fraction) -> int:
        return max(2, int((self._ends <= float(room)).sum()))


def _gains(losses: torch.Tensor, least: int) -> torch.Tensor:
    """What each latent is worth, [F]; never rising, so that the first of a side come first."""
    powers = losses.double().clamp(min=1e-12) ** _POWER
    gains = (powers[:-1] - powers[1:]).clamp(min=0).cummin(0).values
    gains[:least] = torch.inf
    return gains


def _best(worth: Mapping[int, _Worth], room: Fraction) -> dict[int, Fraction]:
    """Bytes that each layer takes of ``room`` where the best latents of all layers are taken."""
    room -= sum((layer.token for layer in worth.values()), Fraction(0))
    costs = torch.stack([layer.costs for layer in worth.values()])
    per_byte = torch.stack([layer.per_byte for layer in worth.values()])
    order = per_byte.flatten().sort(descending=True, stable=True).indices
    taken = torch.zeros_like(costs).flatten()
    taken[order] = (costs.flatten()[order].cumsum(0) <= float(room)).double()
    spent = (taken.view_as(costs) * costs).sum(1).tolist()
    return {
        index: layer.token + Fraction(cost)
        for (index, layer), cost in zip(worth.items(), spent, strict=True)
    }
