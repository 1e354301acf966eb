# SPDX-License-Identifier: Apache-2.0
"""What 4 bits lose of latents, and the bases that lose least by them.

Numbers that share a scale are rounded in equal steps, which their largest sets. Principal
components differ a lot in size, so that the small ones of a token's value would get next to none of
the 16 steps. Any invertible map of the latents goes into the bases and costs nothing. Of all maps,
the fourth root of the energies followed by a rotation that mixes all components loses least: it
makes the stored numbers alike, and their error is c * (sum of the roots of energies)^2 / rank,
where no mixing gives c * rank * the largest energy (rounding per token), or c * the sum of energies
(rounding per channel). QuaRot (https://arxiv.org/abs/2404.00456) and Palu
(https://arxiv.org/abs/2407.21118) rotate for the same reason.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kv_policies.latents.bases_header import Side
from kv_policies.latents.format import GROUP, Bits, rounded
from kv_policies.latents.low_rank import Factor, expected_energy

_SMALLEST = 1e-12  # of the largest energy: what is less is as good as nothing


def spread(factor: Factor, energies: torch.Tensor) -> Factor:
    """The factor with its latents mixed so that rounding loses least; what it restores is the same.

    Args:
        factor: Of rank r.
        energies: Of its latents, [r].
    """
    root = energies.double().clamp(min=_SMALLEST * float(energies.max())) ** 0.25
    mix = cosines(len(root)).to(root.device)
    return Factor(
        (factor.encode.double() / root) @ mix.T,
        mix @ (factor.decode.double() * root[:, None]),
        factor.mean,
    )


def cosines(size: int) -> torch.Tensor:
    """The orthonormal discrete cosine transform (type II), float64 [size, size]."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (at + 0.5) * at[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def stored(latents: torch.Tensor, side: Side) -> torch.Tensor:
    """Latents as a cache of 4 bits returns them, float32.

    Args:
        latents: Of consecutive tokens, [N, rank]; N is a multiple of ``GROUP``.
        side: Keys are rounded per channel, values per token.
    """
    groups = latents.unflatten(0, (-1, GROUP))
    return rounded(groups, 1 if side == "key" else 2).flatten(0, 1)


def restored(factor: Factor, states: torch.Tensor, side: Side, bits: Bits) -> torch.Tensor:
    """States of consecutive tokens, [N, F], as they are read from latents of this many bits.

    In 4 bits the tokens behind the last whole ``GROUP`` are left unrounded.
    """
    latents = factor.latent(states)
    if bits == 4:
        whole = len(latents) // GROUP * GROUP
        latents = torch.cat((stored(latents[:whole], side).to(latents), latents[whole:]))
    return factor.restore(latents)


def rounding_error(
    factor: Factor,
    states: torch.Tensor,
    side: Side,
    metric: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> float:
    """Expected energy of what rounding changes in restored states, beside what the rank loses.

    Args:
        factor: What stores them.
        states: Of consecutive tokens, [N, F].
        side: Keys or values.
        metric: As for ``low_rank.closed_form``.
        weights: As for ``low_rank.moments``.
    """
    whole = len(states) // GROUP * GROUP
    latents = factor.latent(states[:whole])
    error = (stored(latents, side).to(latents) - latents) @ factor.decode
    return expected_energy(error, metric, weights if weights is None else weights[:whole])


def losses(energies: torch.Tensor, errors: Mapping[int, float]) -> torch.Tensor:
    """Share of the energy that is lost with the first 0, 1, .. F latents, [F + 1].

    Args:
        energies: Of all latents, [F], descending.
        errors: What rounding adds at some ranks, for bases that are ``spread``; none for 16 bits.
            Between these ranks it follows the law in the text of this module.
    """
    energies = energies.double()
    left = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))
    if errors:
        rank = torch.arange(len(left), dtype=torch.float64)
        law = torch.cat((energies.new_zeros(1), energies.sqrt().cumsum(0))) ** 2
        law /= rank.clamp(min=1)
        known = sorted(errors)
        factors = [errors[at] / float(law[at]) for at in known]
        left = left + law * torch.from_numpy(np.interp(rank, known, factors))
    return left / left[0]


def mean_losses(losses: Sequence[torch.Tensor], energies: Sequence[torch.Tensor]) -> torch.Tensor:
    """Share of the energy of several sets of KV heads that is lost with as many latents for each.

    Args:
        losses: Of each set, [F + 1].
        energies: Of its latents, [F] each. Sets without energy lose nothing.
    """
    whole = torch.stack([energy.double().sum().cpu() for energy in energies])
    shares = whole / whole.sum()
    return torch.stack(
        [loss * share for loss, share in zip(losses, shares, strict=True) if share != 0]
    ).sum(0)
