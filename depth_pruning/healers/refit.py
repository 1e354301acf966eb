# SPDX-License-Identifier: Apache-2.0
"""refit: fit the linears that write to the hidden states anew in all later blocks, in closed form.

After the first gap, the output projections of attention and MLP of each block that stays get the
ridge correction that brings the hidden states nearest to those of the original model.
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent
from depth_pruning.healers.base import Healed, Healer, HealerSettings, Text, stored_as
from depth_pruning.healers.targets import Pair, token_weights
from depth_pruning.residual import Writers, read_by, writers_of, written
from depth_pruning.ridge import RIDGES, Moments, chosen
from depth_pruning.student import run_block


class RefitSettings(HealerSettings):
    """Settings of ``refit``."""

    ridges: tuple[NonNegativeFloat, ...] = Field(
        RIDGES,
        min_length=1,
        description="in units of a channel's mean square; each linear takes what leaves the least "
        "error on held-out text",
    )


class Refit(Healer):
    """Ridge regression of each writer, block by block, so that each sees what earlier fits left.

    A token counts by the inverse square of its original hidden state: a few tokens have states
    that are hundreds of times larger. A linear that no ridge improves on held-out text keeps its
    weight.
    """

    name: ClassVar[str] = "refit"
    settings_type: ClassVar[type[HealerSettings]] = RefitSettings

    def check(self, blocks: Blocks) -> None:
        """See ``Healer``."""
        writers_of(blocks)

    def heal(self, dropped: Collection[int], text: Text, progress: Progress = silent) -> Healed:
        """See ``Healer``."""
        blocks = text.blocks
        writers, pair = writers_of(blocks), Pair.at(blocks, min(dropped))
        healed: Healed = {}
        for index in range(min(dropped), len(blocks)):
            progress("refit, block", index - min(dropped), len(blocks) - min(dropped))
            if index in dropped:
                pair.original = run_block(blocks, index, pair.original)
                continue
            after = run_block(blocks, index, pair.original.clone())
            fit = _Fit(text, index, writers, self.settings.ridges, pair, after)
            healed[index] = blocks.stages.tensors(f"{text.name} block {index}", fit.weights)
            pair.original = after
            pair.pruned = run_block(blocks, index, pair.pruned, healed[index])
        return healed


class _Fit:
    """The fits of one block.

    Args:
        text: What is learned from.
        index: Of the block.
        writers: Of the block.
        ridges: To choose from.
        pair: The states in front of the block.
        after: The original state behind it.
    """

    def __init__(
        self,
        text: Text,
        index: int,
        writers: Writers,
        ridges: tuple[float, ...],
        pair: Pair,
        after: torch.Tensor,
    ) -> None:
        self.text, self.index, self.writers = text, index, writers
        self.ridges, self.pair, self.after = ridges, pair, after
        self.blocks: Blocks = text.blocks

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the new weights of the block's writers, rounded to what is served."""
        found: dict[str, torch.Tensor] = {}
        with self.blocks.resident(self.index):
            for name in (self.writers.attention, self.writers.mlp):
                fitted, held_out = self._moments(name, found)
                delta, _ = chosen(fitted, held_out, self.ridges)
                weight = self.blocks.layers[self.index].get_submodule(name).weight.detach()
                new = weight.float() if delta is None else weight.float() + delta
                found[name] = stored_as(new, self.blocks)
        return found

    @torch.no_grad()
    def _moments(self, name: str, found: dict[str, torch.Tensor]) -> tuple[Moments, Moments]:
        """Return the regression of a writer on the fitted samples, and on the held-out ones."""
        module = self.blocks.layers[self.index].get_submodule(name)
        outputs, inputs = module.weight.shape  # type: ignore[union-attr,misc]
        sums = [Moments.zeros(int(inputs), int(outputs), self.blocks.device) for _ in range(2)]
        for part in self.blocks.chunks(len(self.pair.original)):
            x, y, weights = self._chunk(name, found, part)
            length = self.pair.original.shape[1]
            cut = max(0, min(len(x), (self.text.fitted - part.start) * length))
            for moments, rows in zip(sums, (slice(cut), slice(cut, None)), strict=True):
                moments.add(x[rows], y[rows], weights[rows])
        return sums[0], sums[1]

    def _chunk(
        self, name: str, found: dict[str, torch.Tensor], part: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what a writer reads, what it should give more, and how much each token counts."""
        blocks, index, writers = self.blocks, self.index, self.writers
        pruned = self.pair.pruned[part].to(blocks.device)
        state = pruned.flatten(0, 1).float()
        if name == writers.attention:
            original = self.pair.original[part].to(blocks.device)
            attended = read_by(blocks, index, name, original)
            added = writers.scale * written(blocks, index, name, attended)
            wanted = original.flatten(0, 1).float() + added
        else:
            wanted = self.after[part].to(blocks.device).flatten(0, 1).float()
        with blocks.replaced(index, found):
            x = read_by(blocks, index, writers.attention, pruned)
            if name == writers.mlp:
                state = state + writers.scale * written(blocks, index, writers.attention, x)
                x = read_by(blocks, index, name, pruned)
            given = written(blocks, index, name, x)
        return x, (wanted - state) / writers.scale - given, token_weights(wanted)
