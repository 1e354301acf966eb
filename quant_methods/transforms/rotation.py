# SPDX-License-Identifier: Apache-2.0
"""Rotations that spread outliers over channels, folded into the weights.

Paper: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, https://arxiv.org/abs/2404.00456.
R1 turns the residual stream, R2 the values of each head. Both cost nothing when the model runs.
"""

from dataclasses import dataclass
from typing import Any

import torch

from compress_common.errors import CompressError
from quant_methods.architecture import (
    DOWN,
    EMBEDDING,
    GATE_UP,
    HEAD,
    O_PROJ,
    QKV,
    architecture_of,
    head_dim_of,
)
from quant_methods.calibration.blocks import Blocks
from quant_methods.formats.plan import Plan

_SMALLEST = 1e-6  # of a norm's weight that moves into its consumers


def hadamard(size: int, seed: int = 0) -> torch.Tensor:
    """Return a random orthogonal matrix, fp32 [size, size].

    A Hadamard matrix with random signs where ``size`` is a power of two. Otherwise the Kronecker
    product of one with a random rotation of the odd part of ``size``.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
    matrix = torch.kron(matrix / power**0.5, torch.linalg.qr(odd).Q.contiguous())
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (signs[:, None] * matrix).float()


def check_residual(config: Any) -> None:
    """Raise CompressError when the residual stream of an architecture cannot be rotated.

    Args:
        config: The text model's ``transformers`` config.
    """
    if architecture_of(config).sandwich_norms:
        raise CompressError(
            f"{config.model_type} has norms behind attention and MLP, which a rotation of the "
            "residual stream cannot pass; rotate heads alone"
        )


@dataclass(frozen=True)
class RotateHeads:
    """R2: turn the values of each head, between v_proj and o_proj. Heads turn alike."""

    seed: int = 0

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """See ``Transform``. Layers whose v_proj or o_proj stays at 16 bits are left alone."""
        plan.matrices["heads"] = hadamard(head_dim_of(blocks.model.config), self.seed)
        for index in range(len(blocks)):
            prefix = blocks.prefix(index)
            if prefix + QKV[2] in plan.grids and prefix + O_PROJ in plan.grids:
                plan.rotations[f"{prefix}{QKV[2]}.output"] = "heads"
                plan.rotations[f"{prefix}{O_PROJ}.input"] = "heads"


@dataclass(frozen=True)
class RotateResidual:
    """R1: turn the residual stream. Norms move into their consumers, and embeddings are untied."""

    seed: int = 0

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """See ``Transform``.

        Raises:
            CompressError: The architecture has norms behind attention and MLP (Gemma 2 and 3),
                which a rotation cannot pass.
        """
        arch, model, config = blocks.arch, blocks.model, blocks.model.config
        check_residual(config)
        plan.matrices["residual"] = hadamard(config.hidden_size, self.seed)
        for index in range(len(blocks)):
            prefix, layer = blocks.prefix(index), blocks.layers[index]
            for norm, consumers in ((arch.attn_norm, QKV), (arch.mlp_norm, GATE_UP)):
                linears = [prefix + name for name in consumers]
                _empty(plan, prefix + norm, layer.get_submodule(norm), linears, arch.norm_offset)
                plan.rotations |= {f"{name}.input": "residual" for name in linears}
            for name in (O_PROJ, DOWN):
                plan.rotations[f"{prefix}{name}.output"] = "residual"
        backbone = arch.layers_prefix.rpartition(".")[0]
        _empty(
            plan, f"{backbone}.norm", model.get_submodule(backbone).norm, [HEAD], arch.norm_offset
        )
        plan.rotations |= {f"{EMBEDDING}.input": "residual", f"{HEAD}.input": "residual"}
        if getattr(config, "tie_word_embeddings", False):
            plan.copies[f"{HEAD}.weight"] = f"{EMBEDDING}.weight"
            plan.config["tie_word_embeddings"] = False


def _empty(plan: Plan, name: str, norm: Any, consumers: list[str], offset: float) -> None:
    """Move the weight of a norm into its consumers, so that the norm scales no channel."""
    stored = plan.vectors.get(f"{name}.weight", norm.weight.detach().float().cpu())
    total = stored.float() + offset
    total = torch.where(total.abs() < _SMALLEST, _SMALLEST, total)
    plan.vectors[f"{name}.weight"] = torch.full_like(total, 1 - offset)
    for linear in consumers:
        before = plan.vectors.get(f"{linear}.input")
        plan.vectors[f"{linear}.input"] = total if before is None else before * total
