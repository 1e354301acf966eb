# SPDX-License-Identifier: Apache-2.0
"""EvoPress: an evolutionary search over the set of blocks that go.

Paper: EvoPress: Accurate Dynamic Model Compression via Evolutionary Search,
https://arxiv.org/abs/2410.14649
"""

from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from compress_common.progress import Progress, silent
from compress_common.search.evolution import EvolutionSettings, Genome, evolve
from compress_common.store import digest
from depth_pruning.searches.base import Ground, Search, SearchSettings, check_count
from depth_pruning.searches.greedy import Greedy
from depth_pruning.searches.single_drop import SingleDrop


class EvoPressSettings(EvolutionSettings, SearchSettings):
    """Settings of ``evopress``. The paper: 160 generations of 32 on 2,048 tokens, random start."""

    generations: int = Field(12, ge=1, le=10_000, description="at most so many; paper: 160")
    offspring: int = Field(4, ge=1, le=4096, description="of each generation; paper: 32")
    survivors: tuple[int, ...] = Field((1,), description="offspring left after each stage")
    tokens: tuple[int, ...] = Field((512,), description="tokens that a stage measures on")
    patience: int = Field(
        6, ge=1, description="stop after so many generations without a better one"
    )
    text_tokens: int = Field(1024, ge=16, description="calibration tokens to draw them from")
    start: Literal["single_drop", "greedy"] = Field(
        "single_drop", description="the search that gives the first parent"
    )


class EvoPress(Search):
    """Swaps blocks that go for blocks that stay, and keeps what lowers the KL divergence.

    The paper drops attention and MLP apart. A standard checkpoint cannot say that, so here whole
    blocks go.
    """

    name: ClassVar[str] = "evopress"
    settings_type: ClassVar[type[SearchSettings]] = EvoPressSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.14649"

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        check_count(count, ground.candidates)
        start = Greedy if self.settings.start == "greedy" else SingleDrop
        shared = SearchSettings(text_tokens=self.settings.text_tokens)
        parent = start(shared).choose(count, ground, progress)

        def blocks(genome: Genome) -> tuple[int, ...]:
            return tuple(i for i, gone in zip(ground.candidates, genome, strict=True) if gone)

        def fitness(genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
            return ground.probe(blocks(genome), tokens, seed)

        found = evolve(
            tuple(int(index in parent) for index in ground.candidates),
            swapped,
            fitness,
            self.settings,
            stages=ground.stages,
            name="evopress "
            + digest(self.settings.model_dump_json(), repr((parent, ground.candidates))),
            progress=progress,
        )
        self.report = {
            "start": list(parent),
            "generations": len(found.curve),
            "curve": [[round(loss, 6) for loss in pair] for pair in found.curve],
        }
        return blocks(found.best)


def swapped(genome: Genome, rng: Random) -> Genome | None:
    """Return a copy in which one to three blocks that go are swapped for others.

    Args:
        genome: 1 where a block goes.
        rng: Draws.

    Returns:
        None where all of the blocks go, or none.
    """
    child = list(genome)
    gone = [place for place, gene in enumerate(child) if gene]
    stay = [place for place, gene in enumerate(child) if not gene]
    count = min(rng.randint(1, 3), rng.randint(1, 3), len(gone), len(stay))
    for place in rng.sample(gone, count) + rng.sample(stay, count):
        child[place] = 1 - child[place]
    return tuple(child) if count else None
