# SPDX-License-Identifier: Apache-2.0
"""The keys or the values of one decoder block of transformers: their factor, and what it loses."""

from typing import Any

import torch
from torch.nn.functional import linear

from kv_policies.bases_header import Objective, Side
from kv_policies.low_rank import (
    asvd,
    closed_form,
    key_metric,
    moments,
    relative_error,
    svd,
    value_metric,
)


class BlockFactor:
    """One side of a block, fitted to ``inputs`` [N, hidden] of its projections.

    attention: the block's attention module, of an architecture in ``quant_methods.architecture``:
        ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and perhaps norms per head ``q_norm`` and
        ``k_norm``. RoPE comes after them, so that their output is the key that is wanted.
    factor: of full rank, best latents first. energies: of each latent in the objective's metric.
    """

    def __init__(
        self, attention: Any, side: Side, inputs: torch.Tensor, objective: Objective
    ) -> None:
        self.attention, self.name = attention, side[0]
        self.magnitude = inputs.abs().mean(0, dtype=torch.float64)
        self.metric = _metric(attention, side, inputs) if objective == "attention" else None
        states = _normed(attention, self.name, _projected(attention, self.name, inputs))
        self.factor, self.energies = closed_form(*moments(states), self.metric)

    def lost(self, rank: int) -> float:
        """Relative error at this rank on the inputs that it was fitted to."""
        return float(self.energies[rank:].sum() / self.energies.sum())

    def errors(self, inputs: torch.Tensor, rank: int) -> dict[str, float]:
        """Relative error at this rank on other inputs, by method.

        SVD and ASVD know of no norm: it comes after what they restore, as in CSKV it would.
        """
        projection = getattr(self.attention, f"{self.name}_proj")
        weight = projection.weight.double().T
        bias = torch.zeros_like(weight[0]) if projection.bias is None else projection.bias.double()
        raw = _projected(self.attention, self.name, inputs)
        states = _normed(self.attention, self.name, raw)
        restored = {"closed_form": self.factor.cut(rank).project(states)}
        others = {"svd": svd(weight, bias), "asvd": asvd(weight, bias, self.magnitude)}
        for method, factor in others.items():
            restored[method] = _normed(self.attention, self.name, factor.cut(rank).project(raw))
        return {k: relative_error(states, found, self.metric) for k, found in restored.items()}


def _projected(attention: Any, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """The output of a projection, as the model computes it, then float64."""
    projection = getattr(attention, f"{name}_proj")
    return linear(inputs, projection.weight, projection.bias).double()


def _normed(attention: Any, name: str, states: torch.Tensor) -> torch.Tensor:
    """States [N, heads * head_dim] after the norm per head that the model may have for them."""
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
