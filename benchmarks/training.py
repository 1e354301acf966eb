# SPDX-License-Identifier: Apache-2.0
"""What the trainings of the tiny models share: a budget of time, and a step down the gradient."""

import time
from collections.abc import Iterator

import torch


def clock(seconds: float) -> Iterator[float]:
    """The share of the time that has passed, until all has."""
    start = time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        yield done


def adam(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of a tiny model; ``descend`` sets its learning rate."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)


def descend(optimizer: torch.optim.AdamW, loss: torch.Tensor, learning_rate: float) -> None:
    """Take a step, with gradients of at most 1 in norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
