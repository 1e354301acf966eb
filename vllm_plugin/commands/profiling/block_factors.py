# SPDX-License-Identifier: Apache-2.0
"""Fits a low-rank factor to the keys or values of one decoder block in transformers."""

from typing import Any, Final

import torch
from torch.nn.functional import linear

from kv_policies.attention import attention_received
from kv_policies.latents.bases_header import Objective, Side
from kv_policies.latents.format import Bits
from kv_policies.latents.low_rank import (
    Factor,
    asvd,
    closed_form,
    key_metric,
    moments,
    relative_error,
    svd,
    token_weights,
    value_metric,
)
from kv_policies.latents.rope import Rope
from kv_policies.latents.rounding import (
    losses,
    mean_losses,
    restored,
    rounding_error,
    spread,
)

_TOKENS: Final = 4096  # that the error of rounding is measured on


class BlockFactor:
    """The factor of a block's keys or values, fitted to what its projections get.

    Args:
        attention: The block's attention module, of a model in
            ``MODELS_WITH_BASES``. It has ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``
            and perhaps the norms per head ``q_norm`` and ``k_norm``. RoPE comes after these, so
            their output is the key to be stored.
        side: Keys or values.
        inputs: Inputs of the projections, [samples, length, hidden].
        weights: Weight of each token, [samples * length]; see ``weights_of``.
        objective: "reconstruction" is the paper's: the error of keys and values. "attention" weighs
            tokens by the attention that they receive, key features by the queries that meet them,
            and value features by what the output projection does with them.
        bits: Of a number of a latent, when it is stored.
        shards: Parts that the KV heads are split into, one per rank of tensor parallelism. Each has
            a factor of its own. All have as many latents.

    Attributes:
        losses: Share of energy in the objective's metric that is lost with the first 0, 1, .. F
            latents of each shard, [F + 1]. What rounding to ``bits`` loses is in it.
    """

    def __init__(
        self,
        attention: Any,
        side: Side,
        inputs: torch.Tensor,
        weights: torch.Tensor | None,
        objective: Objective,
        bits: Bits,
        shards: int = 1,
    ) -> None:
        self.attention, self.side, self.name, self.bits = attention, side, side[0], bits
        flat = inputs.flatten(0, 1)
        self.magnitude = flat.abs().mean(0, dtype=torch.float64)
        self.metric = _metric(attention, side, flat) if objective == "attention" else None
        states = _normed(attention, self.name, _projected(attention, self.name, flat))
        self._parts = features_of_shards(states.shape[1], shards)
        self._fits = [
            _ShardFactor(states[:, part], side, _inside(self.metric, part), weights, bits)
            for part in self._parts
        ]
        self.losses = mean_losses(
            [fit.losses for fit in self._fits], [fit.energies for fit in self._fits]
        )

    def factors(self, rank: int) -> list[Factor]:
        """Return the factor of each shard, cut to this rank, as it is stored."""
        return [fit.factor(rank) for fit in self._fits]

    def errors(
        self, inputs: torch.Tensor, weights: torch.Tensor | None, rank: int
    ) -> dict[str, float]:
        """Return the relative error on other inputs, by method; the closed form's as it is stored.

        SVD and ASVD restore what the projection returns. A norm per head is applied to that.

        Args:
            inputs: [samples, length, hidden].
            weights: Weight of each of their tokens.
            rank: Number of latents.
        """
        projection = getattr(self.attention, f"{self.name}_proj")
        weight = projection.weight.double().T
        bias = torch.zeros_like(weight[0]) if projection.bias is None else projection.bias.double()
        raw = _projected(self.attention, self.name, inputs.flatten(0, 1))
        states = _normed(self.attention, self.name, raw)
        found: dict[str, list[torch.Tensor]] = {"closed_form": [], "svd": [], "asvd": []}
        for part, fit in zip(self._parts, self._fits, strict=True):
            stored = restored(fit.factor(rank), states[:, part], self.side, self.bits)
            found["closed_form"].append(stored)
            own = weight[:, part], bias[part]
            others = {"svd": svd(*own), "asvd": asvd(*own, self.magnitude)}
            for method, factor in others.items():
                projected = factor.cut(rank).project(raw[:, part])
                found[method].append(_normed(self.attention, self.name, projected))
        return {
            method: relative_error(states, torch.cat(parts, 1), self.metric, weights)
            for method, parts in found.items()
        }


class _ShardFactor:
    """The closed form for the KV heads of a shard.

    Args:
        states: Keys or values of these heads, [N, F].
        side: Which of them.
        metric: Of their errors, [F, F]; None: all features count alike.
        weights: Weight of each token, [N]; None: equal.
        bits: Of a number of a latent, when it is stored.

    Attributes:
        energies: Of each latent, [F], descending.
        losses: As of ``BlockFactor``, of these heads.
    """

    def __init__(
        self,
        states: torch.Tensor,
        side: Side,
        metric: torch.Tensor | None,
        weights: torch.Tensor | None,
        bits: Bits,
    ) -> None:
        self._bits = bits
        self._factor, self.energies = closed_form(*moments(states, weights), metric)
        some = slice(_TOKENS)
        errors = {
            rank: rounding_error(
                self.factor(rank),
                states[some],
                side,
                metric,
                weights if weights is None else weights[some],
            )
            for rank in (_ranks_to_measure(len(self.energies)) if bits == 4 else ())
        }
        self.losses = losses(self.energies.cpu(), errors)

    def factor(self, rank: int) -> Factor:
        """Return the factor of this rank, as it is stored."""
        factor = self._factor.cut(rank)
        return spread(factor, self.energies[:rank]) if self._bits == 4 else factor


def features_of_shards(features: int, shards: int) -> list[slice]:
    """Return the features of each shard. The heads of a token lie side by side."""
    each = features // shards
    return [slice(shard * each, (shard + 1) * each) for shard in range(shards)]


def _inside(metric: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    """Return the metric of some features. No metric joins heads, so nothing is lost."""
    return None if metric is None else metric[part, part]


def _ranks_to_measure(features: int) -> list[int]:
    """Return ranks that the error of rounding is measured at; between them it is known."""
    return sorted({max(1, features // part) for part in (16, 4, 2, 1)})


def weights_of(
    attention: Any,
    inputs: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    objective: Objective,
) -> torch.Tensor | None:
    """Return the weight of each token of the inputs, [samples * length]; None: all are equal.

    Args:
        attention: As for ``BlockFactor``.
        inputs: [samples, length, hidden].
        rotation: Cosines and sines of RoPE, [1, length, head_dim] each, as blocks get them.
        objective: As for ``BlockFactor``.
    """
    if objective == "reconstruction":
        return None
    return token_weights(_received(attention, inputs, rotation))


def _received(
    attention: Any, inputs: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the attention that each token receives in its sample, [samples * length].

    It is averaged over heads.
    """
    samples, length, _ = inputs.shape
    cos, sin = (x[0].float()[:, : x.shape[-1] // 2] for x in rotation)
    rope, at = Rope(torch.cat((cos, sin), -1)), torch.arange(length, device=inputs.device)

    def heads(name: str) -> torch.Tensor:
        states = _normed(attention, name, _projected(attention, name, inputs.flatten(0, 1)))
        states = states.float().unflatten(-1, (-1, attention.head_dim))
        turned = rope.rotate(states, at.repeat(samples))
        return turned.unflatten(0, (samples, length)).transpose(1, 2)

    received = attention_received(heads("q"), at.expand(samples, -1), heads("k"), attention.scaling)
    return received.mean(1).flatten()


def _projected(attention: Any, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Return the output of a projection as the model computes it, in float64."""
    projection = getattr(attention, f"{name}_proj")
    return linear(inputs, projection.weight, projection.bias).double()


def _normed(attention: Any, name: str, states: torch.Tensor) -> torch.Tensor:
    """Apply the norm per head, if the model has one, to states [N, heads * head_dim]."""
    norm = getattr(attention, f"{name}_norm", None)
    if norm is None:
        return states
    return norm(states.unflatten(-1, (-1, attention.head_dim))).flatten(-2)


def _metric(attention: Any, side: Side, inputs: torch.Tensor) -> torch.Tensor:
    kv_heads = attention.k_proj.out_features // attention.head_dim
    if side == "value":
        return value_metric(attention.o_proj.weight, kv_heads, attention.head_dim)
    queries = _normed(attention, "q", _projected(attention, "q", inputs))
    return key_metric(queries.square().mean(0), kv_heads, attention.head_dim)
