# SPDX-License-Identifier: Apache-2.0
"""Rotations that spread outliers over channels, folded into the weights.

Paper: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, https://arxiv.org/abs/2404.00456.
R1 turns the residual stream, R2 the values of each head. Both cost nothing when the model runs.
"""

from dataclasses import dataclass
from typing import Any

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from compress_common.structure.layer_structure import Attention
from compress_common.structure.norms import norm_offset
from compress_common.structure.structure import EMBEDDING, HEAD
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
    structure = structure_of(config)
    if structure.towers:
        raise CompressError(
            f"{', '.join(structure.towers)} add to the hidden states of {config.model_type} what "
            "a rotation of the residual stream does not turn; rotate heads alone"
        )
    if not structure.rotates or (structure.embedding, structure.head) != (EMBEDDING, HEAD):
        raise CompressError(
            f"{config.model_type} has norms behind attention and MLP, routed experts or other "
            "readers of hidden states, which a rotation of the residual stream cannot pass; rotate "
            "heads alone"
        )


def check_heads(config: Any) -> Attention:
    """Return the attention of an architecture whose heads can be rotated.

    Args:
        config: The text model's ``transformers`` config.

    Raises:
        CompressError: Its values and its output are not one linear each.
    """
    known = structure_of(config).attention
    if known is None or not known.separate or known.output is None:
        raise CompressError(
            f"{config.model_type} has no linears of its own for values and for the output of "
            "attention, so its heads cannot be rotated; set rotation=none"
        )
    return known


@dataclass(frozen=True)
class RotateHeads:
    """R2: turn the values of each head, between v_proj and o_proj. Heads turn alike."""

    seed: int = 0

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """See ``Transform``. Layers whose v_proj or o_proj stays at 16 bits are left alone."""
        known = check_heads(blocks.model.config)
        plan.matrices["heads"] = hadamard(known.head_dim, self.seed)
        for index in range(len(blocks)):
            prefix = blocks.prefix(index)
            value, output = f"{prefix}{known.value}", f"{prefix}{known.output}"
            if value in plan.grids and output in plan.grids:
                plan.rotations[f"{value}.output"] = "heads"
                plan.rotations[f"{output}.input"] = "heads"


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
        structure, model, config = blocks.structure, blocks.model, blocks.model.config
        check_residual(config)
        plan.matrices["residual"] = hadamard(config.hidden_size, self.seed)
        for index in range(len(blocks)):
            prefix, layer = blocks.prefix(index), blocks.layers[index]
            kind = structure.layer(index)
            for fold in kind.folds:
                if fold.from_norm:
                    linears = [prefix + name for name in fold.consumers]
                    _empty(
                        plan, prefix + fold.producer, layer.get_submodule(fold.producer), linears
                    )
                    plan.rotations |= {f"{name}.input": "residual" for name in linears}
            for name in kind.row_parallel:
                plan.rotations[f"{prefix}{name}.output"] = "residual"
        assert structure.norm is not None
        _empty(plan, structure.norm, model.get_submodule(structure.norm), [HEAD])
        plan.rotations |= {f"{EMBEDDING}.input": "residual", f"{HEAD}.input": "residual"}
        if getattr(config, "tie_word_embeddings", False):
            plan.copies[f"{HEAD}.weight"] = f"{EMBEDDING}.weight"
            plan.config["tie_word_embeddings"] = False


def _empty(plan: Plan, name: str, norm: Any, consumers: list[str]) -> None:
    """Move the weight of a norm into its consumers, so that the norm scales no channel."""
    offset = norm_offset(norm)
    if offset is None:
        raise CompressError(f"the norm {name} does more than scale channels; use no rotation")
    stored = plan.vectors.get(f"{name}.weight", norm.weight.detach().float().cpu())
    total = stored.float() + offset
    total = torch.where(total.abs() < _SMALLEST, _SMALLEST, total)
    plan.vectors[f"{name}.weight"] = torch.full_like(total, 1 - offset)
    for linear in consumers:
        before = plan.vectors.get(f"{linear}.input")
        plan.vectors[f"{linear}.input"] = total if before is None else before * total
