# SPDX-License-Identifier: Apache-2.0
"""A decoder under smoothing: its statistics, and its output when it is also rounded to nearest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Collector, Energies, Maxima
from compress_common.progress import Progress
from compress_common.structure.experts import shown_all
from compress_common.structure.layer_structure import Fold
from quant_methods.calibration.routing import enough_tokens
from quant_methods.formats.plan import layer_grids
from quant_methods.grid import Grid, fake_quantize
from quant_methods.transforms.prove import proved_folds
from quant_methods.transforms.smoothing import (
    clip_percents,
    smoothing_vector,
    to_consumer,
    to_producer,
)

# What is smoothed: nothing, linears behind a norm, or o_proj and down_proj too.
Smoothed = Literal["none", "norms", "all"]


@dataclass
class Statistics:
    """What is observed of one block at full precision.

    Attributes:
        amax: The largest |input| per channel, [K], by the first reader of the input.
        mean_square: Mean of the squared input per channel, [K], by the same. Linears of routed
            experts have their own, of the tokens that went to the expert.
        wmax: The largest |weight| per channel over all consumers of a fold, [K], by the first.
    """

    amax: dict[str, torch.Tensor]
    mean_square: dict[str, torch.Tensor]
    wmax: dict[str, torch.Tensor]

    @classmethod
    def taken(cls, kept: dict[str, torch.Tensor], index: int, device: torch.device) -> Self:
        """Return those of one block from tensors named ``<index>:<statistic>:<linear>``."""
        found: dict[str, dict[str, torch.Tensor]] = {"amax": {}, "mean_square": {}, "wmax": {}}
        for key, tensor in kept.items():
            block, _, rest = key.partition(":")
            if block == str(index):
                statistic, _, name = rest.partition(":")
                found[statistic][name] = tensor.to(device)
        return cls(**found)


class SmoothedDecoder:
    """Observes a decoder once, and then tells what each smoothing strength makes of it.

    Args:
        blocks: The decoder, with calibration tokens.
        grids: ``{linear: how it is rounded}``, by full name.
        smoothed: What is smoothed.
        progress: Called for each block.
        everyone: Whether each routed expert is observed on all tokens.

    Attributes:
        final: The hidden states behind the last block at full precision.
    """

    def __init__(
        self,
        blocks: Blocks,
        grids: dict[str, Grid],
        smoothed: Smoothed,
        progress: Progress,
        everyone: bool = False,
    ) -> None:
        self.grids = [layer_grids(grids, blocks.prefix(index)) for index in range(len(blocks))]
        self.scale_dtype = blocks.scale_dtype
        self.layers = [blocks.structure.layer(index) for index in range(len(blocks))]
        self.everyone = everyone
        self.folds: list[list[Fold]] = [[] for _ in self.grids]
        if smoothed != "none":
            self.folds = [
                [fold for fold in folds if _is_smoothed(fold, smoothed, here, kind.kept)]
                for folds, here, kind in zip(
                    proved_folds(blocks), self.grids, self.layers, strict=True
                )
            ]
        kept = blocks.stages.tensors("statistics", lambda: self._observe(blocks, progress))
        self.final = kept["final"].to(blocks.device)
        self.statistics = [Statistics.taken(kept, i, blocks.device) for i in range(len(blocks))]

    def _observe(self, blocks: Blocks, progress: Progress) -> dict[str, torch.Tensor]:
        """Return the statistics of each block at full precision, and ``final``, the last output."""
        kept: dict[str, torch.Tensor] = {}
        hidden = blocks.inputs()
        for index in range(len(blocks)):
            progress("activations", index + 1, len(blocks))
            kind = self.layers[index]
            shared = set(kind.first_sharing.values())
            maxima, energies = Maxima(shared), Energies(shared | set(kind.first_routed.values()))
            with blocks.resident(index) as block, shown_all(block, self.everyone):
                hidden = blocks.run(index, hidden, (maxima, energies), out=hidden)
                for key, collector in (("amax", maxima), ("mean_square", energies)):
                    for name in sorted(collector.linears):
                        kept[f"{index}:{key}:{name}"] = self._value(index, name, collector)
                for fold in self.folds[index]:
                    weights = [block.get_submodule(c).weight for c in fold.consumers]
                    wmax = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
                    kept[f"{index}:wmax:{fold.consumers[0]}"] = wmax
        return kept | {"final": hidden}

    def _value(self, index: int, name: str, collector: Collector) -> torch.Tensor:
        """Return a statistic of a linear's inputs.

        Where too few tokens went to an expert, what all tokens give stands for it. Where there is
        no such thing, all its inputs count alike.
        """
        kind = self.layers[index]
        if name in kind.routed and not self.everyone:
            grid, inputs = self.grids[index].get(name), kind.shapes[name][1]
            # Without a grid it stays at 16 bits: any token will do.
            enough = 1 if grid is None else enough_tokens(grid, inputs)
            if collector.tokens[name] < enough:
                reader = kind.first_sharing[name]
                return torch.ones(inputs) if reader == name else collector.value(reader)
        return collector.value(name)

    def vectors(self, index: int, alpha: float) -> dict[Fold, torch.Tensor]:
        """Return the smoothing vector of each fold of a block, by channel of its producer.

        Args:
            index: Of the block.
            alpha: Smoothing strength, 0 to 1. More moves more of the range of activations into the
                weights.
        """
        seen, first = self.statistics[index], self.layers[index].first_sharing
        return {
            fold: smoothing_vector(
                to_producer(fold, seen.amax[first[fold.consumers[0]]]),
                to_producer(fold, seen.wmax[fold.consumers[0]]),
                alpha,
            )
            for fold in self.folds[index]
        }

    def propagated(self, blocks: Blocks, alpha: float, *, clip: bool) -> torch.Tensor:
        """Return the last hidden states with every block smoothed and rounded to nearest.

        Norms are left alone, and weights are divided back after rounding, which is the same
        function. The scale of an output row passes into its groups' scales and changes no rounding.

        Args:
            blocks: The decoder, with all or some of the tokens.
            alpha: As in ``vectors``.
            clip: Whether the range of each group is searched.
        """
        hidden = blocks.inputs()
        for index in range(len(blocks)):
            vectors = self.vectors(index, alpha)
            inputs = {c: to_consumer(f, v) for f, v in vectors.items() for c in f.consumers}
            with blocks.resident(index) as block:
                weights = {}
                for name, grid in self.grids[index].items():
                    weight, scale = block.get_submodule(name).weight.float(), inputs.get(name)
                    if scale is not None:
                        weight = weight * scale
                    shrink = None
                    if clip:
                        shrink = self.clip_percents(index, name, weight, scale).float() / 100
                    weights[name] = fake_quantize(weight, grid, shrink, self.scale_dtype)
                    if scale is not None:
                        weights[name].div_(scale)
                with blocks.replaced(index, weights):
                    hidden = blocks.run(index, hidden, out=hidden)
        return hidden

    def clip_percents(
        self, index: int, name: str, weight: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the percentage of each group's range that is kept, uint8 [N, K/group].

        Args:
            index: Of the block.
            name: Of the linear in it.
            weight: Its smoothed weight, [N, K].
            scale: How many times smaller smoothing made its inputs, [K]; None: it is not smoothed.
        """
        kind = self.layers[index]
        reader = kind.first_routed.get(name) or kind.first_sharing[name]
        mean_square = self.statistics[index].mean_square[reader]
        if scale is not None:
            mean_square = mean_square / scale.square()
        return clip_percents(weight, self.grids[index][name], mean_square, self.scale_dtype)


def _is_smoothed(
    fold: Fold, smoothed: Smoothed, grids: dict[str, Grid], kept: Sequence[str]
) -> bool:
    """Whether a fold is wanted, and all linears that it changes are quantized or ``kept``."""
    wanted = smoothed == "all" or (smoothed == "norms" and fold.from_norm)
    changed = fold.consumers if fold.from_norm else (*fold.consumers, fold.producer)
    return wanted and all(name in grids or name in kept for name in changed)
