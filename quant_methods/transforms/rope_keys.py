# SPDX-License-Identifier: Apache-2.0
"""FireQ's scaling of keys in front of RoPE, so that a low-precision KV cache rounds them well.

Paper: FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration,
https://arxiv.org/abs/2505.20839
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Collector
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.structure.derive import structure_of
from compress_common.structure.layer_structure import Attention, Fold
from quant_methods.formats.plan import Plan
from quant_methods.transforms.prove import Proof
from quant_methods.transforms.smoothing import to_consumer

_FLOOR = 1e-5  # of the largest norm of a pair
_LIMIT = 1e4  # of a factor, and of its inverse


def check_keys(config: Any) -> Attention:
    """Return the attention of an architecture whose keys can be scaled.

    Args:
        config: The text model's ``transformers`` config.

    Raises:
        CompressError: They cannot.
    """
    known = structure_of(config).attention
    leave = "set key_scale to null (--set key_scale=null) to leave keys alone"
    if known is None or not known.separate:
        raise CompressError(
            f"{config.model_type} has no linears of its own for queries and keys; {leave}"
        )
    if known.key_norms:
        raise CompressError(
            f"{config.model_type} normalizes queries and keys in front of RoPE, which would undo a "
            f"scaling of keys; {leave}"
        )
    return known


def pair_factors(largest: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the factor of each key channel, [heads * head_dim].

    RoPE turns channel d together with channel d + head_dim / 2. Both have one factor, so that the
    factor and the rotation commute.

    Args:
        largest: The largest norm of each pair over all tokens, [heads, head_dim / 2].
        scale: What it becomes.
    """
    factors = (scale / largest.float().clamp(min=_FLOOR)).clamp(1 / _LIMIT, _LIMIT)
    return torch.cat([factors, factors], dim=1).flatten()


class PairMaxima(Collector):
    """The largest norm of each rotary pair of the keys of a block, [heads, head_dim / 2].

    Args:
        name: Of the linear that gives the keys.
        k_proj: That linear.
        head_dim: Channels of a head.
    """

    def __init__(self, name: str, k_proj: nn.Linear, head_dim: int) -> None:
        super().__init__((name,))
        self.k_proj, self.head_dim = k_proj, head_dim

    def joined(
        self, total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See the base class. Token weights do not matter."""
        bias = self.k_proj.bias
        keys = nn.functional.linear(
            x, self.k_proj.weight.float(), None if bias is None else bias.float()
        )
        pairs = keys.view(len(x), -1, 2, self.head_dim // 2)
        largest = torch.linalg.vector_norm(pairs, dim=2).amax(0)
        return largest if total is None else torch.maximum(total, largest)


@dataclass(frozen=True)
class ScaleKeys:
    """Multiply each rotary pair of the keys, and divide the queries that meet it.

    Args:
        scale: The largest norm that a pair then has on the calibration text.
        progress: Called for each block.
    """

    scale: float
    progress: Progress = silent

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """See ``Transform``."""
        known = check_keys(blocks.model.config)
        kept = blocks.stages.tensors("rotary pairs", lambda: self._observed(blocks, known))
        shapes = blocks.structure.shapes
        repeat = shapes[known.query][0] // shapes[known.key][0]
        groups = Fold(known.key, (known.query,), False, 0.0, repeat, known.head_dim)
        hidden = blocks.first(1).inputs()
        for index in range(len(blocks)):
            prefix, factors = blocks.prefix(index), pair_factors(kept[str(index)], self.scale)
            sides = {
                f"{known.key}.output": 1 / factors,
                f"{known.query}.output": to_consumer(groups, factors),
            }
            _check_rope(Proof(blocks, index, hidden), sides, blocks.structure.model_type)
            plan.vectors |= {f"{prefix}{side}": vector for side, vector in sides.items()}

    @torch.no_grad()
    def _observed(self, blocks: Blocks, known: Attention) -> dict[str, torch.Tensor]:
        """Return the largest norms of all blocks on the calibration text."""
        found: dict[str, torch.Tensor] = {}
        hidden = blocks.inputs()
        for index in range(len(blocks)):
            self.progress("keys", index + 1, len(blocks))
            with blocks.resident(index) as block:
                k_proj = block.get_submodule(known.key)
                maxima = PairMaxima(known.key, k_proj, known.head_dim)  # type: ignore[arg-type]
                hidden = blocks.run(index, hidden, (maxima,), out=hidden)
                found[str(index)] = maxima.value(known.key).cpu()
        return found


def _check_rope(proof: Proof, sides: dict[str, torch.Tensor], model_type: str) -> None:
    """Raise CompressError where factors and the rotation do not commute: RoPE has other pairs."""
    if not proof.unchanged(sides, needed=()):
        raise CompressError(
            f"RoPE of {model_type} does not turn channel d together with channel "
            "d + head_dim / 2, so keys cannot be scaled; set key_scale to null (--set "
            "key_scale=null) to leave keys alone"
        )
