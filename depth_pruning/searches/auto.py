# SPDX-License-Identifier: Apache-2.0
"""auto: heal what several searches find, and take what loses least on text kept for the choice."""

from dataclasses import replace
from statistics import median
from typing import ClassVar

from pydantic import Field

from compress_common.progress import Progress, silent
from depth_pruning.searches.base import Ground, Search, SearchSettings, check_count
from depth_pruning.searches.evopress import EvoPress, EvoPressSettings
from depth_pruning.searches.greedy import Greedy
from depth_pruning.searches.window import Window, window_starts


class AutoSettings(SearchSettings):
    """Settings of ``auto``."""

    far: float = Field(
        4.0, gt=1, description="blocks that alone cost so many times the median stay"
    )
    generations: int = Field(6, ge=0, le=10_000, description="of the evolution; 0: none")
    offspring: int = Field(4, ge=1, le=4096, description="of each generation")


class Auto(Search):
    """Best window, greedy set and a short evolution from it; each is healed before it is judged.

    The ranking of sets before healing does not predict that after it.
    """

    name: ClassVar[str] = "auto"
    settings_type: ClassVar[type[SearchSettings]] = AutoSettings

    def choose(self, count: int, ground: Ground, progress: Progress = silent) -> tuple[int, ...]:
        """See ``Search``."""
        check_count(count, ground.candidates)
        costs = ground.single(progress)
        limit = self.settings.far * median(costs.values())
        near = tuple(index for index in ground.candidates if costs[index] <= limit)
        ground = replace(ground, candidates=near)
        searches: dict[str, Search] = {"greedy": Greedy(self.settings)}
        if window_starts(near, count):
            searches["window"] = Window(self.settings)
        if self.settings.generations:
            searches["evopress"] = EvoPress(self._evolution())
        sets: dict[tuple[int, ...], list[str]] = {}
        for name, search in searches.items():
            sets.setdefault(search.choose(count, ground, progress), []).append(name)
        losses = {}
        for done, found in enumerate(sets):
            progress("heal a candidate", done, len(sets))
            losses[found] = ground.healed(found)
        best = min(losses, key=losses.__getitem__)
        self.report = {
            "kl_alone": {str(i): round(cost, 6) for i, cost in costs.items()},
            "left_out": [index for index in costs if index not in near],
            "candidates": [
                {"by": names, "blocks": list(s), "kl_healed": round(losses[s], 6)}
                for s, names in sets.items()
            ],
        }
        return best

    def _evolution(self) -> EvoPressSettings:
        """Return the settings of a short evolution that begins where greedy ends."""
        given = self.settings
        return EvoPressSettings(
            start="greedy",
            generations=given.generations,
            offspring=given.offspring,
            tokens=(given.text_tokens,),
            text_tokens=given.text_tokens,
        )
