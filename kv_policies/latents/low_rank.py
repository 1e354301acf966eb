# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of keys and values, in closed form.

CSKV (https://arxiv.org/abs/2409.10593) replaces a projection W by A B of rank r and trains A and B
for the least E|x W - x A B|^2. That is reduced-rank regression. Its optimum is known: the principal
components of k = x W itself. Training cannot lower this loss (a test tries), so nothing is trained
here. The latent comes from k as it is cached, not from x. So a bias goes into the mean and costs no
rank, and a norm on keys (Qwen3) needs no care.

The published starting points are the same solution for less knowledge of x. SVD of W assumes that
the features of x are independent and equally large, ASVD (https://arxiv.org/abs/2312.05821) that
they are independent.

There are F = num_kv_heads * head_dim features, the heads of one token side by side. All maths is in
float64.
"""

from dataclasses import dataclass

import torch

# Directions that a metric does not see count this much of the most seen one: it can be inverted.
_FLOOR = 1e-6
_EPSILON = 1e-6  # of ASVD's published code


@dataclass(frozen=True)
class Factor:
    """A latent of r numbers in place of F.

    ``decode @ encode`` is the identity: what is restored has the latent that it comes from.

    Attributes:
        encode: [F, r].
        decode: [r, F].
        mean: [F].
    """

    encode: torch.Tensor
    decode: torch.Tensor
    mean: torch.Tensor

    def latent(self, states: torch.Tensor) -> torch.Tensor:
        """States [.., F] to latents [.., r]."""
        return (states - self.mean) @ self.encode

    def restore(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents [.., r] to states [.., F]."""
        return self.mean + latent @ self.decode

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """What is left of states [.., F]."""
        return self.restore(self.latent(states))

    def cut(self, rank: int) -> "Factor":
        """The first ``rank`` latents only."""
        return Factor(self.encode[:, :rank], self.decode[:rank], self.mean)

    def float(self) -> "Factor":
        """In float32, on the CPU, in memory of its own."""
        tensors = (self.encode, self.decode, self.mean)
        return Factor(*(t.to("cpu", torch.float32, copy=True).contiguous() for t in tensors))


def moments(
    states: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [F] and covariance [F, F] of states [N, F]; weights [N] of the tokens, None: equal."""
    states = states.double()
    share = _shares(states, weights)
    mean = share @ states
    centred = states - mean
    return mean, centred.T * share @ centred


def token_weights(received: torch.Tensor) -> torch.Tensor:
    """How much an error of each token matters, [N], from the attention that it received.

    Half is shared out by attention, so that the few tokens that all queries see (the first one
    above all, whose keys are like no other's) are kept well: bases that treat tokens alike lose
    them, and with them the text. Half is even, as what nobody asked for in this text may be asked
    for in another.
    """
    received = received.double()
    return (received / received.sum() + 1 / len(received)) / 2


def _shares(states: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return torch.full_like(states[:, 0], 1 / len(states))
    weights = weights.to(states)
    return weights / weights.sum()


def closed_form(
    mean: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor | None = None
) -> tuple[Factor, torch.Tensor]:
    """The factor of full rank, best latents first, and the energy of each: [F], descending.

    metric: symmetric [F, F] that measures an error e as e^T metric e; None: |e|^2. Of all maps of
    rank r ``cut(r)`` has the least expected error; it is the sum of ``energies[r:]``.
    """
    root = inverse = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    if metric is not None:
        scales, axes = torch.linalg.eigh(metric)
        scales = scales.clamp(min=_FLOOR * float(scales[-1])).sqrt()
        root, inverse = axes * scales @ axes.T, axes / scales @ axes.T
    energies, directions = torch.linalg.eigh(root @ covariance @ root)
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
    return Factor(root @ directions, directions.T @ inverse, mean), energies


def svd(weight: torch.Tensor, bias: torch.Tensor) -> Factor:
    """SVD of a projection's weight [in, F]: ``A = weight @ encode``, ``B = decode``."""
    return asvd(weight, bias, torch.ones_like(weight[:, 0]))


def asvd(weight: torch.Tensor, bias: torch.Tensor, magnitude: torch.Tensor) -> Factor:
    """ASVD with its alpha of 0.5; magnitude [in] is the mean of |x|.

    ``diag(s) weight = U S V^T`` with ``s = magnitude^0.5`` and ``A B = diag(1/s) U_r S_r V_r^T``
    amount to ``weight V_r V_r^T``.
    """
    return closed_form(bias, weight.T * (magnitude + _EPSILON) @ weight)[0]


def key_metric(queries: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """How much attention scores change with an error of the keys, [F, F], diagonal.

    queries: mean square of each query feature [num_heads * head_dim], before or after RoPE, which
    turns pairs (i, i + head_dim / 2). Over all relative positions a pair of the key is met by the
    mean energy of that pair in the queries of its group. Limit: slow pairs hardly turn within a
    context, so that their queries have a direction, which this leaves out.
    """
    pairs = queries.double().view(kv_heads, -1, 2, head_dim // 2).mean((1, 2))
    return _scaled(pairs.repeat(1, 2).flatten().diag())


def value_metric(output: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """How much the attention's output changes with an error of the values, [F, F].

    output: weight of the output projection [hidden, num_heads * head_dim]. Blocks on the diagonal,
    one per KV head: sum of W^T W over the query heads of its group.
    """
    heads = output.double().unflatten(1, (kv_heads, -1, head_dim)).transpose(0, 1)
    heads = heads.reshape(kv_heads, -1, head_dim)
    return _scaled(torch.block_diag(*(heads.mT @ heads)))


def _scaled(metric: torch.Tensor) -> torch.Tensor:
    """Its mean eigenvalue is one, so that latents are about as large as what they stand for."""
    return metric * (len(metric) / metric.trace())


def relative_error(
    states: torch.Tensor,
    restored: torch.Tensor,
    metric: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> float:
    """Expected error of restored states [N, F] over that of their mean: 0 exact, 1 nothing kept.

    metric, weights: as for ``closed_form`` and ``moments``.
    """
    mean = _shares(states, weights) @ states
    lost, whole = (
        expected_energy(error, metric, weights) for error in (states - restored, states - mean)
    )
    return lost / whole


def expected_energy(
    errors: torch.Tensor,
    metric: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> float:
    """Mean over tokens of ``e^T metric e`` for errors [N, F]; arguments as ``relative_error``'s."""
    share = _shares(errors, weights)
    return float(share @ (errors * (errors if metric is None else errors @ metric)).sum(1))
