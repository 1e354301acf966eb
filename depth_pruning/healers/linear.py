# SPDX-License-Identifier: Apache-2.0
"""linear: a linear map in place of each gap, folded into the down_proj in front of it.

Paper: ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization,
https://arxiv.org/abs/2505.02819
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent
from depth_pruning.healers.base import Healed, Healer, HealerSettings, Text, stored_as
from depth_pruning.healers.targets import Pair, token_weights
from depth_pruning.residual import Writers, captured, writers_of
from depth_pruning.ridge import RIDGES, Moments, chosen
from depth_pruning.student import run_block


class LinearSettings(HealerSettings):
    """Settings of ``linear``."""

    ridges: tuple[NonNegativeFloat, ...] = Field(
        RIDGES,
        min_length=1,
        description="in units of a channel's mean square; chosen on held-out text",
    )


class Linear(Healer):
    """The MLP's output in front of a gap is multiplied by the matrix that replaces the gap best.

    The paper fits it without a ridge. Here the ridge pulls it to the identity, and is chosen on
    held-out text. It suits a single window; several gaps are healed one after the other.
    """

    name: ClassVar[str] = "linear"
    settings_type: ClassVar[type[HealerSettings]] = LinearSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.02819"

    def check(self, blocks: Blocks) -> None:
        """See ``Healer``."""
        writers_of(blocks)

    def heal(self, dropped: Collection[int], text: Text, progress: Progress = silent) -> Healed:
        """See ``Healer``."""
        blocks, gone = text.blocks, set(dropped)
        fronts = [index - 1 for index in sorted(gone) if index - 1 not in gone]
        writers, pair = writers_of(blocks), Pair.at(blocks, fronts[0])
        healed: Healed = {}
        for done, front in enumerate(fronts):
            progress("map of a gap", done, len(fronts))
            end = next(i for i in range(front + 1, len(blocks) + 1) if i not in gone)
            for index in range(front, end):
                pair.original = run_block(blocks, index, pair.original)

            def compute(front: int = front, pair: Pair = pair) -> dict[str, torch.Tensor]:
                return {writers.mlp: _folded(text, front, writers, self.settings.ridges, pair)}

            healed[front] = blocks.stages.tensors(f"{text.name} block {front}", compute)
            pair.pruned = run_block(blocks, front, pair.pruned, healed[front])
            following = fronts[done + 1] if done + 1 < len(fronts) else end
            for index in range(end, following):
                pair.original = run_block(blocks, index, pair.original)
                pair.pruned = run_block(blocks, index, pair.pruned)
        return healed


@torch.no_grad()
def _folded(
    text: Text, front: int, writers: Writers, ridges: tuple[float, ...], pair: Pair
) -> torch.Tensor:
    """Return the down_proj of the block in front of a gap, times the map that replaces the gap.

    Args:
        text: What is learned from.
        front: Index of the block.
        writers: Of the block.
        ridges: To choose from.
        pair: The pruned state in front of the block, and the original one behind the gap.
    """
    blocks: Blocks = text.blocks
    hidden, length = pair.original.shape[-1], pair.original.shape[1]
    sums = [Moments.zeros(hidden, hidden, blocks.device) for _ in range(2)]
    with blocks.resident(front):
        module = blocks.layers[front].get_submodule(writers.mlp)
        weight = module.weight.detach().float()  # type: ignore[union-attr,operator]
        for part in blocks.chunks(len(pair.original)):
            with captured(blocks, front, (writers.mlp,)) as seen:
                out = blocks.output(front, pair.pruned[part].to(blocks.device))
            x = writers.scale * (seen[writers.mlp] @ weight.t())  # without the bias
            wanted = pair.original[part].to(blocks.device).flatten(0, 1).float()
            missing = wanted - out.flatten(0, 1).float()
            cut = max(0, min(len(x), (text.fitted - part.start) * length))
            weights = token_weights(wanted)
            for moments, rows in zip(sums, (slice(cut), slice(cut, None)), strict=True):
                moments.add(x[rows], missing[rows], weights[rows])
        delta, _ = chosen(sums[0], sums[1], ridges)
        return stored_as(weight if delta is None else weight + delta @ weight, blocks)
