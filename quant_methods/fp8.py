# SPDX-License-Identifier: Apache-2.0
"""int4 weights as vLLM's FP8 kernel for Hopper multiplies them: pure functions.

The kernel turns the bfloat16 scales of a checkpoint into one FP8 number per group and one fp32
number per output channel. A table of FP8 numbers, code times group scale, replaces the codes.
"""

import torch

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max  # 448
# vLLM's least scale of a row that it rounds to FP8.
_LEAST_CHANNEL = 1 / (_LARGEST * 512)
# Group scales stop at 448 / 8, so that a code of -8 times a group scale is still an FP8 number.
_CODES = 8
_LEAST_GROUP = 2.0**-9  # the smallest FP8 number above 0


def converted(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales that vLLM makes of those of a checkpoint when it loads them.

    Args:
        scale: Of each group, bfloat16 values [N, K/group].

    Returns:
        The scale of each group, FP8 [N, K/group], and of each output channel, fp32 [N, 1].
    """
    scale = scale.float()
    channel = (scale.amax(-1, keepdim=True) / _LARGEST).clamp(min=_LEAST_CHANNEL)
    group = (scale / channel).clamp(max=_LARGEST).to(FP8)
    return (group.float() / _CODES).to(FP8), channel * _CODES


def served_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the nearest scales that vLLM's conversion leaves as they are, fp32 [N, K/group].

    They are bfloat16 values. None is 0: a group that is small beside the others of its row has the
    smallest scale that the kernel knows.

    Args:
        scale: Of each group, [N, K/group], above 0.
    """
    group, channel = converted(scale.to(torch.bfloat16))
    return (group.float().clamp(min=_LEAST_GROUP) * channel).to(torch.bfloat16).float()


def served_weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weights that the kernel multiplies with, fp32 [N, K/group, group].

    Args:
        codes: -8 to 7, fp32 [N, K/group, group].
        scale: As the checkpoint has it, [N, K/group].
    """
    group, channel = converted(scale)
    return _entry(codes, group.float()[..., None], channel[..., None])


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes, -8 to 7, whose entry in the kernel's table is nearest: fp32, as ``weight``.

    Args:
        weight: fp32 [N, K/group, group].
        scale: As ``served_scale`` returns it, [N, K/group].
    """
    group, channel = converted(scale)
    return nearest_entries(weight, group.float()[..., None], channel[..., None])[0]


def nearest_entries(
    weight: torch.Tensor, group: torch.Tensor, channel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, -8 to 7, whose entries are nearest, and these entries: fp32, as ``weight``.

    Args:
        weight: fp32, any shape.
        group: Of each weight, the fp32 value of its group's scale, above 0.
        channel: Of each weight, the scale of its output channel.
    """
    codes = (weight / (group * channel)).round_().clamp_(-_CODES, _CODES - 1)
    entries = _entry(codes, group, channel)
    for step in (-1, 1):
        other = (codes + step).clamp_(-_CODES, _CODES - 1)
        entry = _entry(other, group, channel)
        better = (entry - weight).abs() < (entries - weight).abs()
        codes, entries = torch.where(better, other, codes), torch.where(better, entry, entries)
    return codes, entries


def _entry(codes: torch.Tensor, group: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    return (codes * group).to(FP8).float() * channel


def served_activation(x: torch.Tensor) -> torch.Tensor:
    """Return activations [tokens, K] as the kernel rounds them: FP8 with one scale per token."""
    scale = (x.float().abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=_LEAST_CHANNEL)
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8).float() * scale
