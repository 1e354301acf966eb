# SPDX-License-Identifier: Apache-2.0
"""fusegpt: fuse what a dropped block knew into its neighbors, by a short local distillation.

Paper: FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers,
https://arxiv.org/abs/2411.14507
"""

from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import parametrize

from compress_common.calibration.blocks import Blocks
from compress_common.consecutive import consecutive
from compress_common.progress import Progress, silent
from depth_pruning.healers.base import Healed, Healer, HealerSettings, Text, stored_as
from depth_pruning.healers.targets import Pair, token_weights
from depth_pruning.student import run_block


class FuseGPTSettings(HealerSettings):
    """Settings of ``fusegpt``. The paper: rank 128, groups of 8 blocks, thousands of steps."""

    rank: int = Field(32, ge=1, description="of BA and of each CD; paper: 128")
    reach: int = Field(2, ge=1, description="blocks that learn, on each side of a gap")
    steps: int = Field(24, ge=1, description="of each gap, each on a few samples")
    samples: int = Field(8, ge=1, description="of a step")
    learning_rate: float = Field(3e-4, gt=0)
    seed: int = Field(0, ge=0, description="of the samples and of A and D")


class FuseGPT(Healer):
    """Learns ``W + BA + sum(CD * W_dropped)`` in the blocks around each gap.

    The loss is the squared error of the group's output, relative to the original one. It is trained
    gap by gap, and folded into the weights at the end. A group whose error on held-out text did not
    fall keeps its weights. At equal short training the fused term added nothing to BA alone, and
    both lost to ``refit``.
    """

    name: ClassVar[str] = "fusegpt"
    settings_type: ClassVar[type[HealerSettings]] = FuseGPTSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14507"

    def heal(self, dropped: Collection[int], text: Text, progress: Progress = silent) -> Healed:
        """See ``Healer``."""
        blocks, at = text.blocks, 0
        healed: Healed = {}
        pair: Pair | None = None
        for begin, end in consecutive(sorted(dropped)):
            gap = list(range(begin, end + 1))
            first, last = group(gap, dropped, len(blocks), self.settings.reach, at)
            if pair is None:
                pair = Pair.at(blocks, first)
            else:
                self._advance(blocks, pair, range(at, first), dropped)
            after = pair.original.clone()
            for index in range(first, last):
                after = run_block(blocks, index, after)
            train = _Training(text, self.settings, pair.pruned, after, progress)
            kept = [index for index in range(first, last) if index not in dropped]
            compute = partial(train.weights, kept, gap)
            stored = blocks.stages.tensors(f"{text.name} gap {gap[0]}", compute)
            for name, weight in stored.items():
                block, _, linear = name.partition(" ")
                healed.setdefault(int(block), {})[linear] = weight
            for index in kept:
                pair.pruned = run_block(blocks, index, pair.pruned, healed[index])
            pair.original, at = after, last
        return healed

    @staticmethod
    def _advance(blocks: Blocks, pair: Pair, between: range, dropped: Collection[int]) -> None:
        """Run the blocks between two groups."""
        for index in between:
            pair.original = run_block(blocks, index, pair.original)
            if index not in dropped:
                pair.pruned = run_block(blocks, index, pair.pruned)


def group(
    gap: list[int], dropped: Collection[int], depth: int, reach: int, begin: int = 0
) -> tuple[int, int]:
    """Return the first block of a gap's group, and the one behind its last.

    Args:
        gap: The blocks of the gap.
        dropped: All blocks that are gone. Those of later gaps do not belong to the group.
        depth: Blocks of the model.
        reach: Blocks that learn, on each side.
        begin: Blocks in front of this one have learned already.
    """
    first = max(begin, gap[0] - reach)
    end = gap[-1] + 1
    while end < depth and end - gap[-1] <= reach and end not in dropped:
        end += 1
    return first, end


class _Fused(nn.Module):
    """``W + BA + sum(CD * W_dropped)``, as a parametrization of a linear's weight.

    Args:
        weight: W, [N, K].
        dropped: Weights of the same linear in the dropped blocks, [N, K] each.
        rank: Of BA and of each CD.
        random: Draws A and D. B and C are zero, so that training starts at W.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        dropped: list[torch.Tensor],
        rank: int,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape

        def drawn() -> nn.Parameter:
            found = torch.randn(rank, inputs, generator=random) / inputs**0.5
            return nn.Parameter(found.to(weight.device))

        def zeros() -> nn.Parameter:
            return nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

        self.dropped = dropped
        self.a, self.b = drawn(), zeros()
        self.c = nn.ParameterList([zeros() for _ in dropped])
        self.d = nn.ParameterList([drawn() for _ in dropped])

    @torch.no_grad()
    def off(self) -> None:
        """Make the fused weight W again."""
        for matrix in (self.b, *self.c):
            matrix.zero_()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the fused weight for W."""
        fused = weight + self.b @ self.a
        for c, d, dropped in zip(self.c, self.d, self.dropped, strict=True):
            fused = fused + (c @ d) * dropped
        return fused.to(weight.dtype)


class _Training:
    """The distillation of one group.

    Args:
        text: What is learned from.
        settings: Of the healer.
        given: The pruned state in front of the group, [samples, length, hidden].
        wanted: The original state behind it.
        progress: Called for each step.
    """

    def __init__(
        self,
        text: Text,
        settings: FuseGPTSettings,
        given: torch.Tensor,
        wanted: torch.Tensor,
        progress: Progress,
    ) -> None:
        self.text, self.settings, self.progress = text, settings, progress
        self.given, self.wanted = given, wanted
        self.blocks: Blocks = text.blocks

    def weights(self, kept: list[int], gap: list[int]) -> dict[str, torch.Tensor]:
        """Return ``{"block linear": weight}`` of the blocks that learn, folded.

        Args:
            kept: Indices of the blocks that learn.
            gap: Indices of the blocks whose weights are fused into them.
        """
        random = torch.Generator().manual_seed(self.settings.seed)
        with ExitStack() as stack:
            for index in (*kept, *gap):
                stack.enter_context(self.blocks.resident(index))
            before = self._held_out_error(kept)
            fused: dict[str, nn.Module] = {}
            parts: list[_Fused] = []
            for index in kept:
                for name in self.blocks.structure.layer(index).names:
                    linear = self.blocks.layers[index].get_submodule(name)
                    gone = [self._weight(i, name) for i in gap]
                    parts.append(_Fused(linear.weight.detach(), gone, self.settings.rank, random))
                    linear.weight.requires_grad_(False)
                    parametrize.register_parametrization(linear, "weight", parts[-1])
                    fused[f"{index} {name}"] = linear
            try:
                self._learn(kept, [p for part in parts for p in part.parameters()], random)
                if not self._held_out_error(kept) < before:  # NaN where the steps diverged
                    for part in parts:
                        part.off()
                return {n: stored_as(m.weight.detach(), self.blocks) for n, m in fused.items()}
            finally:
                for module in fused.values():
                    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    def _weight(self, index: int, name: str) -> torch.Tensor:
        return self.blocks.layers[index].get_submodule(name).weight.detach()  # type: ignore[return-value]

    def _learn(self, kept: list[int], learned: list[nn.Parameter], random: torch.Generator) -> None:
        """Take the steps."""
        given = self.settings
        optimizer = torch.optim.AdamW(learned, lr=given.learning_rate, weight_decay=0.0)
        for step in range(given.steps):
            self.progress("distil, step", step, given.steps)
            chosen = torch.randperm(self.text.fitted, generator=random)[: given.samples]
            with torch.enable_grad():
                loss = self._error(kept, chosen)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

    def _error(self, kept: list[int], samples: torch.Tensor) -> torch.Tensor:
        """Return the relative squared error of the group's output on some samples."""
        hidden = self.given[samples].to(self.blocks.device)
        for index in kept:
            hidden = self.blocks.output(index, hidden)
        wanted = self.wanted[samples].to(self.blocks.device).flatten(0, 1).float()
        error = (hidden.flatten(0, 1).float() - wanted).square().mean(-1)
        return (error * token_weights(wanted)).mean()

    @torch.no_grad()
    def _held_out_error(self, kept: list[int]) -> float:
        """Return the error on the samples that nothing is fitted to, a few at a time."""
        samples = torch.arange(self.text.fitted, len(self.given))
        few = samples.split(self.settings.samples)
        return sum(float(self._error(kept, part)) * len(part) for part in few) / len(samples)
