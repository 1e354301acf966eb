# SPDX-License-Identifier: Apache-2.0
"""EvoPress: an evolutionary search over the levels of units.

Paper: EvoPress: Accurate Dynamic Model Compression via Evolutionary Search,
https://arxiv.org/abs/2410.14649
"""

from functools import partial
from random import Random
from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent
from compress_common.search.evolution import EvolutionSettings, Fitness, Genome, evolve
from compress_common.store import digest
from quant_methods.allocators.base import Allocator, AllocatorSettings, Levels, Probe
from quant_methods.allocators.budget import smallest
from quant_methods.allocators.probe import KLProbe, KLProbeSettings
from quant_methods.calibration.levels import LevelDatabase

_MOST_CHANGES = 10  # of a child, as in the paper's code


class EvoPressSettings(EvolutionSettings, AllocatorSettings):
    """Settings of ``evopress``. The paper has ``start="random", swap="size"`` and more tokens."""

    start: Literal["probe", "random"] = Field(
        "probe", description="first parent: the result of `probe`, or the best of random ones"
    )
    swap: Literal["any", "size"] = Field(
        "any",
        description="any: bits move between all units, at their exact cost; size (paper): between "
        "units of equal size only",
    )
    candidates: int = Field(16, ge=1, le=4096, description="random first parents to choose from")


class EvoPress(Allocator):
    """Move bits between units, and keep what lowers the KL divergence.

    It finds what units do together, which ``probe`` cannot see. Each candidate is one pass of the
    model over the text of its stage, so this is a method for a GPU or a small model.
    """

    name: ClassVar[str] = "evopress"
    settings_type: ClassVar[type[AllocatorSettings]] = EvoPressSettings
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.14649"
    needs: ClassVar[str] = "the probes of `probe`, then one per candidate of each generation"

    def __init__(self, settings: EvoPressSettings) -> None:
        super().__init__(settings)
        self.first = KLProbe(KLProbeSettings())

    def observe(self, blocks: Blocks, database: LevelDatabase, progress: Progress = silent) -> None:
        """Remember where generations and the results of probes are kept."""
        super().observe(blocks, database, progress)
        self.first.observe(blocks, database, progress)

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
        space = Space(sizes, budget)

        def fitness(genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
            return probe(space.bits(genome), tokens, seed)

        name = f"evopress {digest(self.settings.model_dump_json(), repr(budget))}"
        if self.settings.start == "probe":
            start = space.genome(self.first.allocate(levels, sizes, budget, probe, progress))
        else:
            stored = self.stages.tensors(f"{name} start", partial(self._start, space, fitness))
            start = tuple(stored["parent"].tolist())
        found = evolve(
            start,
            space.swapped if self.settings.swap == "any" else space.swapped_equal,
            fitness,
            self.settings,
            stages=self.stages,
            name=f"{name} {start}",
            progress=progress,
        )
        self.report = {
            "generations": len(found.curve),
            "replaced": sum(after < before for before, after in found.curve),
            "curve": [[round(loss, 6) for loss in pair] for pair in found.curve],
            "kept_start": found.best == start,
        }
        return space.bits(found.best)

    def _start(self, space: "Space", fitness: Fitness) -> dict[str, torch.Tensor]:
        """Return the best of some random genomes."""
        rng = Random(f"{self.settings.seed} start")
        drawn = [space.drawn(rng) for _ in range(self.settings.candidates)]
        seed, tokens = rng.getrandbits(31), self.settings.tokens[0]
        best = min(drawn, key=lambda genome: fitness(genome, tokens, seed))
        return {"parent": torch.tensor(best, dtype=torch.int64)}


class Space:
    """The allocations within a budget. A gene counts the levels of a unit from its cheapest.

    Args:
        sizes: Size of each unit at each level.
        budget: Size of all units together.
    """

    def __init__(self, sizes: Levels, budget: float) -> None:
        self.budget = budget
        self.units = list(sizes)
        self.levels = [sorted(costs, key=costs.__getitem__) for costs in sizes.values()]
        self.costs = [sorted(costs.values()) for costs in sizes.values()]
        groups: dict[tuple[float, ...], list[int]] = {}
        for index, costs in enumerate(self.costs):
            groups.setdefault(tuple(costs), []).append(index)
        self.groups = [group for group in groups.values() if len(group) > 1]

    def bits(self, genome: Genome) -> dict[str, int]:
        """Return the bits of each unit."""
        found = zip(self.units, self.levels, genome, strict=True)
        return {unit: levels[gene] for unit, levels, gene in found}

    def genome(self, bits: dict[str, int]) -> Genome:
        """Return the genes of an allocation."""
        found = zip(self.units, self.levels, strict=True)
        return tuple(levels.index(bits[unit]) for unit, levels in found)

    def size(self, genome: Genome | list[int]) -> float:
        """Return the size of an allocation."""
        return sum(costs[gene] for costs, gene in zip(self.costs, genome, strict=True))

    def swapped(self, genome: Genome, rng: Random) -> Genome | None:
        """Raise one to three units by a level, lower others until all fit, and use what is left."""
        child = list(genome)
        raisable = [i for i, gene in enumerate(child) if gene + 1 < len(self.costs[i])]
        count = min(rng.randint(1, 3), rng.randint(1, 3))
        raised = rng.sample(raisable, min(count, len(raisable)))
        for index in raised:
            child[index] += 1
        self._lower(child, [i for i in range(len(child)) if i not in raised], rng)
        if self.size(child) > self.budget:
            return None
        self._raise(child, rng)
        changed = sum(a != b for a, b in zip(child, genome, strict=True))
        return tuple(child) if changed <= _MOST_CHANGES else None

    def swapped_equal(self, genome: Genome, rng: Random) -> Genome | None:
        """Raise units by a level, and for each lower another of the same size."""
        child = list(genome)
        if not self.groups:
            return None
        weights = [len(group) * self.costs[group[0]][-1] for group in self.groups]
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            group = rng.choices(self.groups, weights)[0]
            up, down = rng.sample(group, 2)
            if child[up] + 1 < len(self.costs[up]) and child[down] > 0:
                child[up], child[down] = child[up] + 1, child[down] - 1
        return tuple(child) if self.size(child) <= self.budget else None

    def drawn(self, rng: Random) -> Genome:
        """Return a random genome that meets the budget: uniform levels, lowered at random."""
        child = [0] * len(self.units)
        for gene in range(max(map(len, self.costs))):
            child = [min(gene, len(costs) - 1) for costs in self.costs]
            if self.size(child) >= self.budget:
                break
        self._lower(child, list(range(len(child))), rng)
        self._raise(child, rng)
        return tuple(child)

    def _lower(self, child: list[int], among: list[int], rng: Random) -> None:
        """Lower random units until all fit, or nothing is left to lower."""
        size = self.size(child)
        among = [index for index in among if child[index] > 0]
        while size > self.budget and among:
            index = rng.choice(among)
            child[index] -= 1
            size = self.size(child)
            if child[index] == 0:
                among.remove(index)

    def _raise(self, child: list[int], rng: Random) -> None:
        """Raise random units as long as all fit."""
        size = self.size(child)
        for index in rng.sample(range(len(child)), len(child)):
            costs, gene = self.costs[index], child[index]
            more = costs[gene + 1] - costs[gene] if gene + 1 < len(costs) else None
            if more is not None and size + more <= self.budget:
                child[index], size = gene + 1, size + more
