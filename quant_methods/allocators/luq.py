# SPDX-License-Identifier: Apache-2.0
"""LUQ: layers whose outputs have low entropy get the low level.

Paper: LUQ: Layerwise Ultra-Low Bit Quantization for Multimodal Large Language Models,
https://arxiv.org/abs/2509.23729
"""

from functools import partial
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from compress_common.calibration.blocks import Blocks
from compress_common.checkpoints.identity import tensor_digest
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import smallest, total
from quant_methods.calibration.entropy import cluster_entropy, mean_ranks
from quant_methods.calibration.levels import LevelDatabase


class LUQSettings(AllocatorSettings):
    """Settings of ``luq``."""

    low: int | None = Field(None, description="level of the low layers; unset: the lowest")
    high: int | None = Field(
        None, description="level of the other layers; unset: 4, or the next above the low one"
    )
    clusters: int = Field(100, ge=2, le=4096, description="k-means clusters of a layer's outputs")
    seeds: int = Field(5, ge=1, le=100, description="rankings that are averaged")
    tokens: int = Field(2048, ge=16, description="calibration tokens that a ranking clusters")
    image_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of these tokens that are of chats with images, where `--images` gives "
        "some; smaller: fewer patches of images among them",
    )
    sweep: int = Field(
        3,
        ge=1,
        description="numbers of low layers that are measured, from the smallest that fits; the "
        "best is taken",
    )

    @model_validator(mode="after")
    def _mixed(self) -> Self:
        if not 0 < self.image_tokens() < self.tokens:
            raise ValueError(
                f"an image_share of {self.image_share:g} of {self.tokens} tokens leaves none of "
                "images, or none of text; change one of them"
            )
        return self

    def image_tokens(self) -> int:
        """See ``AllocatorSettings``."""
        return round(self.image_share * self.tokens)


class LUQ(Allocator):
    """Give whole layers one of two levels, those with the lowest entropy the low one.

    The paper's low level is BiLLM at about 1.1 bits, which no kernel serves. The entropies of
    layers differ by about 2 %, so ranks are averaged over seeds. No unit is measured, so ``probe``
    is better on most models. Budget above all layers at the high level is left unused.

    A model of images and text is ranked on a mix of both where chats with images are given, as in
    the paper, which finds half to all of the tokens about equally good. Here levels are rounded and
    compared on text alone.
    """

    name: ClassVar[str] = "luq"
    settings_type: ClassVar[type[AllocatorSettings]] = LUQSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.23729"
    needs: ClassVar[str] = "one pass of the 16-bit model"
    takes_images: ClassVar[bool] = True

    def __init__(self, settings: LUQSettings) -> None:
        super().__init__(settings)
        self.ranks: dict[str, float] = {}  # {layer: mean rank}

    @torch.no_grad()
    def observe(self, blocks: Blocks, database: LevelDatabase, progress: Progress = silent) -> None:
        """Rank the layers by the entropy of their outputs."""
        super().observe(blocks, database, progress)
        found, hidden = [], blocks.inputs()
        for index in range(len(blocks)):
            progress("entropy", index + 1, len(blocks))
            with blocks.resident(index):
                hidden = blocks.run(index, hidden, out=hidden)
            name = f"entropy {self.settings.model_dump_json()} {index}"
            pictured = None if self.images is None else self.images[index]
            if pictured is not None:
                name += f" {tensor_digest(pictured)}"
            stored = blocks.stages.tensors(name, partial(self._entropies, hidden, pictured))
            found.append(stored["entropy"])
        ranks = mean_ranks(torch.stack(found))
        self.ranks = {blocks.prefix(i).rstrip("."): rank for i, rank in enumerate(ranks)}

    def _entropies(
        self, hidden: torch.Tensor, pictured: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return the entropy of a layer's outputs, by seed. Each seed takes other tokens.

        Args:
            hidden: On text, [samples, length, hidden].
            pictured: On chats with images, [tokens, hidden]; None: there are none.
        """
        points, values = hidden.flatten(0, 1), []
        of_images = 0 if pictured is None else self.settings.image_tokens()
        for seed in range(self.settings.seeds):
            generator = torch.Generator().manual_seed(seed)
            few = _drawn(points, self.settings.tokens - of_images, generator)
            if pictured is not None:
                few = torch.cat((few, _drawn(pictured, of_images, generator).to(few)))
            values.append(cluster_entropy(few, self.settings.clusters, generator))
        return {"entropy": torch.tensor(values, dtype=torch.float64)}

    def allocate(
        self,
        levels: Levels,
        sizes: Levels,
        budget: float,
        probe: Probe,
        progress: Progress = silent,
    ) -> dict[str, int]:
        """See ``Allocator``."""
        smallest(sizes, budget)
        low, high = self._pair(sizes)
        layers = list(dict.fromkeys(unit.rpartition(".")[0] for unit in sizes))
        layers.sort(key=lambda layer: self.ranks[layer])  # stable: equal ranks by depth

        def at(count: int) -> dict[str, int]:
            lowered = set(layers[:count])
            return {unit: low if unit.rpartition(".")[0] in lowered else high for unit in sizes}

        fits = [k for k in range(len(layers) + 1) if total(sizes, at(k)) <= budget]
        if not fits:
            raise CompressError(
                f"the budget of {budget / 8:.0f} bytes is below the "
                f"{total(sizes, at(len(layers))) / 8:.0f} bytes of all layers at {low} bits; raise "
                "the budget or lower `low`"
            )
        tried = fits[: self.settings.sweep]
        losses = {}
        for done, k in enumerate(tried, start=1):
            progress("low layers", done, len(tried))
            name = f"luq {low} {high} {sorted(self.ranks.items())} {k}"
            losses[k] = self.stages.number(name, partial(probe, at(k)))
        best = min(tried, key=losses.__getitem__)
        self.report = {
            "low": low,
            "high": high,
            "low_layers": layers[:best],
            "mean_rank": {layer: round(self.ranks[layer], 2) for layer in layers},
            "sweep": {str(k): loss for k, loss in losses.items()},
        }
        return at(best)

    def _pair(self, sizes: Levels) -> tuple[int, int]:
        """Return the two levels."""
        common = sorted(set.intersection(*(set(costs) for costs in sizes.values())))
        low = self.settings.low if self.settings.low is not None else common[0]
        above = [bits for bits in common if bits > low]
        high = self.settings.high
        if high is None:
            high = 4 if 4 in above else above[0] if above else low
        if low not in common or high not in common or low > high:
            raise CompressError(
                f"luq needs a low level and a high one above it among {common}, got {low} and "
                f"{high}"
            )
        return low, high


def _drawn(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return so many of some points, [n, d]; all where there are fewer."""
    chosen = torch.randperm(len(points), generator=generator)[:count]
    return points[chosen.to(points.device)]
