# SPDX-License-Identifier: Apache-2.0
"""The interface of a search: which blocks go."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compress_common.calibration.stages import Stages
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from depth_pruning.cutting import ranges
from depth_pruning.probe import DropProbe


class TooFewBlocks(CompressError):
    """A search may not drop as many blocks as were asked for."""


@dataclass(frozen=True)
class Ground:
    """What a search can measure.

    Attributes:
        probe: Drops blocks without healing, on calibration text.
        healed: Returns the KL of a set after healing, on text that is kept for such choices.
        candidates: The blocks that may go.
        stages: Where measurements are kept, so that an interrupted search goes on.
    """

    probe: DropProbe
    healed: Callable[[tuple[int, ...]], float]
    candidates: tuple[int, ...]
    stages: Stages

    def cost(self, dropped: Collection[int]) -> float:
        """Return the KL that dropping some blocks costs on all of the probe's text."""
        name = f"drop {ranges(dropped)}"
        return self.stages.number(name, partial(self.probe, tuple(sorted(dropped))))

    def single(self, progress: Progress = silent) -> dict[int, float]:
        """Return what each candidate costs alone."""
        costs = {}
        for done, index in enumerate(self.candidates, start=1):
            progress("drop each block alone", done, len(self.candidates))
            costs[index] = self.cost((index,))
        return costs


class SearchSettings(BaseModel):
    """What the settings of all searches have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(512, ge=16, description="calibration tokens of a measurement")


class Search(ABC):
    """Chooses the blocks that go.

    Attributes:
        name: What users write.
        settings_type: The pydantic model of its settings. An instance is built from one.
        paper: Address of the paper, or "".
        settings: Their values.
        report: What ``choose`` wants users to see. JSON-able.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[SearchSettings]] = SearchSettings
    paper: ClassVar[str] = ""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.report: dict[str, Any] = {}

    @abstractmethod
    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """Return the indices of the blocks that go, in order.

        Args:
            count: How many: at least one.
            ground: Measures.
            progress: Called as the search advances.

        Raises:
            TooFewBlocks: There are not so many candidates.
        """


def lowest(costs: dict[int, float], count: int) -> tuple[int, ...]:
    """Return the blocks of the lowest costs, in order. The first of two equal ones wins.

    Args:
        costs: By block.
        count: How many.

    Raises:
        TooFewBlocks: There are fewer.
    """
    check_count(count, costs)
    return tuple(sorted(sorted(costs, key=costs.__getitem__)[:count]))


def checked(dropped: Collection[int], count: int, candidates: Collection[int]) -> tuple[int, ...]:
    """Return what a search chose, in order.

    Raises:
        CompressError: It is not so many of the candidates, as may happen with searches of others.
    """
    found = tuple(sorted(set(dropped)))
    if len(found) != count or not set(found) <= set(candidates):
        raise CompressError(
            f"the search returned blocks {sorted(dropped)}, where {count} of {ranges(candidates)} "
            "were asked for; report this to its author, or give another --search"
        )
    return found


def check_count(count: int, candidates: Collection[int]) -> None:
    """Raise TooFewBlocks when fewer blocks may go than should."""
    if count > len(candidates):
        raise TooFewBlocks(
            f"only {len(candidates)} blocks may go, not {count}: the others cost far more than the "
            "median; drop fewer, or give --search greedy, which leaves none out"
        )
