# SPDX-License-Identifier: Apache-2.0
"""What a norm does to its weight, told by running a copy of it on random numbers."""

import copy

import torch
from torch import nn

_CHANNELS_APART = 1e-4


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its stored weight: 0, or 1 for Gemma; None: something else."""
    small = _copied(norm)
    x = torch.randn(4, small.weight.numel(), generator=torch.Generator().manual_seed(0))
    small.weight.fill_(0)
    zero = small(x)
    small.weight.fill_(1)
    step = small(x) - zero
    scale = step.norm()
    for offset in (0.0, 1.0):
        if (zero - offset * step).norm() <= _CHANNELS_APART * scale:
            return offset
    return None


@torch.no_grad()
def passes_rotation(norm: nn.Module) -> bool:
    """Whether a norm only divides by the length of its input: RMSNorm, without a bias."""
    small = _copied(norm)
    if getattr(small, "bias", None) is not None:
        return False
    x = 3 + torch.randn(4, small.weight.numel(), generator=torch.Generator().manual_seed(0))
    small.weight.fill_(1)
    return bool(torch.cosine_similarity(small(x), x).min() > 1 - _CHANNELS_APART)


def _copied(norm: nn.Module) -> nn.Module:
    """Return a float32 copy on the CPU, with a bias of zero."""
    small = copy.deepcopy(norm).to_empty(device="cpu").float()
    vars(small).pop("forward", None)  # that of a widened model, which would run the original
    if getattr(small, "bias", None) is not None:
        small.bias.zero_()  # type: ignore[operator]
    return small
