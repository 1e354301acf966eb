# SPDX-License-Identifier: Apache-2.0
"""FireQ's channel scaling: folds by the statistics of weights alone.

Paper: FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration,
https://arxiv.org/abs/2505.20839
"""

from dataclasses import dataclass

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.structure.layer_structure import Fold
from quant_methods.formats.plan import Plan
from quant_methods.transforms.prove import proved_folds
from quant_methods.transforms.smoothing import add_fold, smoothing_vector


@dataclass(frozen=True)
class WeightFolds:
    """Scale the input channels of gate, up and down so that their mean |weight| is equal.

    The paper divides a constant of its own by that mean. A constant passes into the scales of the
    groups and changes no rounding, so here the geometric mean of the factors is one. The folds are
    those whose constant is not 0 in the authors' code: norm to gate and up, and up to down.
    """

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """See ``Transform``. Folds with a linear that stays at 16 bits are left out."""
        for index, folds in enumerate(proved_folds(blocks)):
            prefix = blocks.prefix(index)
            for fold in folds:
                if _of_attention(blocks, fold):
                    continue
                changed = (*fold.consumers, *(() if fold.from_norm else (fold.producer,)))
                if not all(prefix + name in plan.grids for name in changed):
                    continue
                block = blocks.layers[index]
                weights = [block.get_submodule(name).weight for name in fold.consumers]
                mean = torch.cat([weight.detach().float().abs() for weight in weights]).mean(0)
                vector = smoothing_vector(torch.ones_like(mean), mean, alpha=0)
                add_fold(plan, blocks, index, fold, vector.cpu())


def _of_attention(blocks: Blocks, fold: Fold) -> bool:
    """Whether a fold changes what attention reads or gives."""
    known = blocks.structure.attention
    if known is None:
        return False
    names = known.query, known.key, known.value, known.output
    return any(name in names for name in fold.consumers)
