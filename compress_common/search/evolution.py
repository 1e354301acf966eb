# SPDX-License-Identifier: Apache-2.0
"""An elitist evolutionary search over lists of integers, with selection in several stages.

It knows nothing about bits: a gene may be the level of a unit, or whether a layer is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf, isnan
from random import Random
from typing import Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_common.calibration.stages import Stages, Tensors
from compress_common.progress import Progress, silent

Genome = tuple[int, ...]
# Returns a changed copy; None: this draw gave nothing valid.
Mutate = Callable[[Genome, Random], Genome | None]
_DRAWS = 10  # per offspring, until a search with few neighbors gives up


class Fitness(Protocol):
    """Measures a genome. Lower is better."""

    def __call__(self, genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
        """Return the loss on ``tokens`` tokens that ``seed`` chooses; None: on all text."""
        ...


class EvolutionSettings(BaseModel):
    """Settings of the search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generations: int = Field(50, ge=1, le=10_000, description="at most so many; paper: 150")
    offspring: int = Field(16, ge=1, le=4096, description="of each generation; paper: 128")
    survivors: tuple[int, ...] = Field(
        (4, 2, 1), description="offspring that are left after each stage; paper: [16, 4, 1]"
    )
    tokens: tuple[int, ...] = Field(
        (256, 512, 2048),
        description="tokens that a stage measures on; paper: [2048, 16384, 131072]",
    )
    patience: int = Field(
        20, ge=1, description="stop after so many generations without a better one"
    )
    seed: int = Field(0, ge=0, description="of mutations and of the text of each stage")

    @model_validator(mode="after")
    def _stages(self) -> Self:
        falling = all(a > b for a, b in zip(self.survivors, self.survivors[1:], strict=False))
        if len(self.survivors) != len(self.tokens) or not falling or self.survivors[-1:] != (1,):
            raise ValueError(
                "survivors must fall to 1 and have as many entries as tokens, got "
                f"survivors {list(self.survivors)} and tokens {list(self.tokens)}"
            )
        if min(self.tokens) < 1:
            raise ValueError(f"tokens must be positive, got {list(self.tokens)}")
        return self

    def search_tokens(self) -> int:
        """Return the tokens that the last stage needs. With more, each stage has fresh text."""
        return max(self.tokens)


@dataclass
class Evolution:
    """The result of a search.

    Attributes:
        best: The last parent, or the start if that loses less on all text.
        curve: ``(loss of the parent, loss of what replaced it or stayed)`` of each generation. Both
            are of the same text; generations have different texts.
        losses: Of the start and of the last parent on all text; None: they are the same.
    """

    best: Genome
    curve: list[tuple[float, float]] = field(default_factory=list)
    losses: tuple[float, float] | None = None


def evolve(
    start: Genome,
    mutate: Mutate,
    fitness: Fitness,
    settings: EvolutionSettings,
    *,
    stages: Stages | None = None,
    name: str = "evolution",
    progress: Progress = silent,
) -> Evolution:
    """Improve a genome over generations. The result never loses more than the start on all text.

    A generation accepts a child on little text, so noise can lead the search away from its start.

    Each generation draws from its own seed and is stored, so an interrupted search goes on where
    it stopped, and ends as if it had not been interrupted.

    Args:
        start: The first parent.
        mutate: Returns a changed copy of a genome.
        fitness: Measures a genome.
        settings: Sizes of the search.
        stages: Where generations are kept; None: nowhere.
        name: Prefix of the names of stages. Says all that the search depends on besides ``stages``.
        progress: Called for each generation.
    """
    kept = stages or Stages()
    found, idle = Evolution(start), 0
    for number in range(settings.generations):
        progress("generation", number + 1, settings.generations)
        stored = kept.tensors(
            f"{name} {number}",
            partial(_generation, found.best, mutate, fitness, settings, number),
        )
        child = tuple(stored["parent"].tolist())
        idle = idle + 1 if child == found.best else 0
        found.best = child
        before, after = stored["loss"].tolist()
        found.curve.append((before, after))
        if idle == settings.patience:
            break
    if found.best != start:
        stored = kept.tensors(f"{name} end", partial(_end, start, found.best, fitness))
        before, after = stored["loss"].tolist()
        found.losses = before, after
        if before <= after:
            found.best = start
    return found


def _end(start: Genome, last: Genome, fitness: Fitness) -> Tensors:
    """Return the losses of the start and of the last parent on all text."""
    losses = [_number(fitness(genome)) for genome in (start, last)]
    return {"loss": torch.tensor(losses, dtype=torch.float64)}


def _generation(
    parent: Genome, mutate: Mutate, fitness: Fitness, settings: EvolutionSettings, number: int
) -> Tensors:
    """Return the next parent, with the losses of both on the text of the last stage.

    The parent joins the last stage and wins ties. A loss of an earlier stage is never used again:
    that of the best of many candidates on little text is too low by luck.
    """
    rng = Random(f"{settings.seed} {number}")
    candidates = _offspring(parent, mutate, settings.offspring, rng)
    before = after = 0.0
    for stage, (count, tokens) in enumerate(zip(settings.survivors, settings.tokens, strict=True)):
        seed = rng.getrandbits(31)  # fresh text
        last = stage == len(settings.survivors) - 1
        if last:
            candidates.insert(0, parent)
        if len(candidates) > count or last:
            losses = [_number(fitness(genome, tokens, seed)) for genome in candidates]
            order = sorted(range(len(losses)), key=losses.__getitem__)  # stable: ties to the first
            before, after = losses[0], losses[order[0]]
            candidates = [candidates[index] for index in order[:count]]
    return {
        "parent": torch.tensor(candidates[0], dtype=torch.int64),
        "loss": torch.tensor([before, after], dtype=torch.float64),
    }


def _number(loss: float) -> float:
    return inf if isnan(loss) else loss


def _offspring(parent: Genome, mutate: Mutate, count: int, rng: Random) -> list[Genome]:
    """Return different children of a parent, fewer than ``count`` where there are not so many."""
    children: dict[Genome, None] = {}
    for _ in range(_DRAWS * count):
        child = mutate(parent, rng)
        if child is not None and child != parent:
            children[child] = None
            if len(children) == count:
                break
    return list(children)
