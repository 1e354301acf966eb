# SPDX-License-Identifier: Apache-2.0
"""Predicts the active rows of a batch, a bounded number at a time."""

from collections.abc import Callable, Sequence

import torch

from dllm_denoising.commit import predict
from dllm_denoising.memory import parts
from vllm_plugin.diffusion.running import Running

Logits = Callable[[torch.Tensor], torch.Tensor | None]


def predictions(
    batch: Sequence[Running],
    hidden: torch.Tensor,
    active: torch.Tensor,
    logits_of: Logits,
    mask: int,
    most: int,
) -> torch.Tensor | None:
    """Predict all active positions, those of one request after the other.

    Args:
        batch: The requests.
        hidden: Hidden states [T, width] of all rows.
        active: Places of the active positions among them, int64 [M].
        logits_of: Returns logits [rows, V] of hidden states, or None on ranks that have none.
        mask: The mask token.
        most: Rows that are predicted at a time.

    Returns:
        Probabilities and tokens, float64 [2, M], which holds tokens exactly. They are one tensor
        because that is sent and read back at once. None on ranks without logits.
    """
    found, first = [], 0
    for part in parts([len(one.denoiser.plan.active) for one in batch], most):
        rows = sum(count for _, count in part)
        logits = logits_of(hidden[active[first : first + rows]])
        first += rows
        if logits is not None:
            found += _predicted(batch, part, logits, mask)
    if not found:
        return None
    return torch.stack([torch.cat(some).double() for some in zip(*found, strict=True)])


def _predicted(
    batch: Sequence[Running], part: list[tuple[int, int]], logits: torch.Tensor, mask: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Predict one part; requests that sample need noise of their own."""
    if not any(batch[request].denoiser.samples for request, _ in part):
        return [predict(logits, mask)]
    found = []
    for (request, count), mine in zip(part, logits.split([c for _, c in part]), strict=True):
        noise = batch[request].denoiser.noise(count, logits.shape[1])
        found.append(predict(mine, mask, None if noise is None else noise.to(logits.device)))
    return found
