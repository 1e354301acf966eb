# SPDX-License-Identifier: Apache-2.0
"""How many different things the outputs of a layer say: the entropy of their clusters."""

import torch

_ROUNDS = 10


@torch.no_grad()
def cluster_entropy(points: torch.Tensor, clusters: int, generator: torch.Generator) -> float:
    """Return the entropy of the shares of k-means clusters, in nats.

    Args:
        points: [n, d].
        clusters: How many; at most n are made.
        generator: Chooses the first centers among the points. Of the CPU.
    """
    points = points.float()
    first = torch.randperm(len(points), generator=generator)[:clusters]
    centers = points[first.to(points.device)]
    nearest = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centers).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        # An empty cluster keeps its center.
        moved = sums / counts.clamp(min=1)[:, None]
        centers = torch.where(counts[:, None] > 0, moved, centers)
    share = torch.bincount(nearest, minlength=len(centers)).double() / len(points)
    return -(share * share.clamp(min=1e-300).log()).sum().item()


def mean_ranks(values: torch.Tensor) -> list[float]:
    """Return the rank of each layer among all, 0 for the lowest, as a mean over seeds.

    Args:
        values: [layers, seeds].
    """
    return values.argsort(dim=0, stable=True).argsort(dim=0).double().mean(1).tolist()
