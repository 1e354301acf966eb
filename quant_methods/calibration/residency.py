# SPDX-License-Identifier: Apache-2.0
"""Copies of a module's tensors on another device, for as long as they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def copied(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a module compute on a device while the context lasts, and put its own tensors back.

    Args:
        module: Whose parameters and buffers are copied, unless they are on the device already.
        device: Where to.
    """
    own: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    try:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or tensor.device == device:
                        continue
                    there = tensor.detach().to(device)
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=tensor.requires_grad)
                    own.append((tensors, name, tensor))
                    tensors[name] = there
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor
