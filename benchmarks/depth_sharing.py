# SPDX-License-Identifier: Apache-2.0
"""Adjacent decoder blocks that share their weights, with a low-rank correction of each.

Runs as a part of ``benchmarks.depth_routing``.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import Options, Result
from benchmarks.random_models import Size, random_llama
from benchmarks.texts import opticks, windows
from benchmarks.weights_judge import losses
from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Grams
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import load_model
from compress_common.progress import silent
from compress_common.structure.derive import structure_of
from vllm_plugin.demo_model import demo_model_path

RANKS = (64, 128)
_DEEP = Size(128, 256, 6, 4, 2, 49152, tie_word_embeddings=True)  # for --smoke
_DAMPING = 0.01  # of the mean diagonal of a Gram matrix


@dataclass(frozen=True)
class Correction:
    """What a linear of a pair has: a mean that both share, and its own best correction.

    Attributes:
        linear: The module whose weight is replaced.
        own: Its original weight, [N, K].
        mean: [N, K].
        up: [N, R], the most important directions first.
        down: [R, K].
    """

    linear: nn.Linear
    own: torch.Tensor
    mean: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def saved(self, rank: int) -> int:
        """Return the numbers that this linear saves: half of a mean, less its correction."""
        return max(self.own.numel() // 2 - rank * sum(self.own.shape), 0)

    def apply(self, rank: int) -> None:
        """Replace the weight, unless the correction is as large as what sharing saves."""
        shared = self.mean + self.up[:, :rank] @ self.down[:rank]
        self.linear.weight.data = shared if self.saved(rank) else self.own


def low_rank(
    weight: torch.Tensor, gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors that change the outputs of a weight least, among those of their rank.

    Args:
        weight: fp32 [N, K].
        gram: Mean outer product of its inputs, [K, K].
        rank: At most so many.

    Returns:
        [N, R] and [R, K].
    """
    damping = _DAMPING * gram.diagonal().mean()
    root = torch.linalg.cholesky(gram + damping * torch.eye(len(gram)))
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    return left[:, :rank] * values[:rank], down


@torch.no_grad()
def corrections(blocks: Blocks, rank: int) -> list[Correction]:
    """Return the corrections of every linear of every pair of adjacent blocks.

    Args:
        blocks: The original, with calibration tokens.
        rank: The largest that is asked for.
    """
    found, hidden = [], blocks.inputs()
    for first in range(0, len(blocks) - 1, 2):
        pair = range(first, first + 2)
        names = blocks.structure.layer(first).names
        grams = [Grams(names) for _ in pair]
        for index, gram in zip(pair, grams, strict=True):
            hidden = blocks.run(index, hidden, [gram])
        for name in names:
            linears = [blocks.layers[index].get_submodule(name) for index in pair]
            weights = [linear.weight.data for linear in linears]
            mean = torch.stack(weights).mean(0)
            for linear, weight, gram in zip(linears, weights, grams, strict=True):
                factors = low_rank(weight - mean, gram.value(name), rank)
                found.append(Correction(linear, weight, mean, *factors))
    return found


def model_folder(options: Options) -> Path:
    """Return the demo model; for --smoke a random one of six blocks."""
    return random_llama(_DEEP, options) if options.smoke else demo_model_path()


def sharing(options: Options, result: Result) -> None:
    """Fill the keys of the part."""
    ranks = (8, 16) if options.smoke else RANKS
    checkpoint = Checkpoint(model_folder(options))
    first, second = opticks()
    count, length = (4, 64) if options.smoke else (32, 128)
    text = torch.tensor(list(windows(checkpoint.tokenizer, first, count, length)))
    count, length = (2, 64) if options.smoke else (8, 192)
    judged = torch.tensor(list(windows(checkpoint.tokenizer, second, count, length + 1)))
    model = load_model(checkpoint, torch.float32)
    total = sum(parameter.numel() for parameter in model.parameters())
    base = losses(model, judged, silent)
    found = corrections(Blocks(model, structure_of(checkpoint.hf_config), text), max(ranks))
    for key, rank in zip(RANKS, ranks, strict=True):
        for each in found:
            each.apply(rank)
        saved = sum(each.saved(rank) for each in found)
        gaps = [a - b for a, b in zip(losses(model, judged, silent), base, strict=True)]
        result.put(f"share_{key}_nats", statistics.fmean(gaps), windows=gaps)
        result.put(f"share_{key}_nats_se", statistics.stdev(gaps) / len(gaps) ** 0.5)
        result.put(f"share_{key}_bytes_ratio", 1 - saved / total)
