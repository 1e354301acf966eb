# SPDX-License-Identifier: Apache-2.0
"""What a user asks of depth pruning."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import joined
from depth_pruning.architecture import LARGEST_SHARE, count_problems, model_problems, set_problems
from depth_pruning.healers.base import Healer
from depth_pruning.healers.registry import build_healer
from depth_pruning.searches.base import Search
from depth_pruning.searches.registry import build_search

PARTS = 8  # of eight samples six are fitted to, one chooses between fits and sets, one judges


class PruneRequest(BaseModel):
    """Everything besides the checkpoint that decides which blocks go, and what replaces them.

    Attributes:
        drop: How many blocks go.
        layers: The blocks that go, by index; then nothing is searched.
        max_loss: As many go as this bound allows, in nats of KL on the samples that judge. How many
            is found by bisection: a set that is cheap though smaller ones cost more is missed.
        search: Name of the search.
        search_settings: Its settings.
        heal: Name of the healer.
        heal_settings: Its settings.
        calibration: The text. Two of eight samples are held out: one chooses, one judges.
        force: Whether more than a quarter of the blocks may go, and blocks that alone cost more
            than a nat.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    drop: int | None = Field(None, ge=0)
    layers: tuple[int, ...] | None = None
    max_loss: float | None = Field(None, gt=0)
    search: str = "auto"
    search_settings: dict[str, Any] = Field(default_factory=dict)
    heal: str = "refit"
    heal_settings: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSettings = CalibrationSettings(samples=96, length=128)
    force: bool = False

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        ways = {"--drop": self.drop, "--layers": self.layers, "--max-loss": self.max_loss}
        given = [option for option, value in ways.items() if value is not None]
        if not given:
            raise ValueError("give one of --drop, --layers and --max-loss")
        if len(given) > 1:
            raise ValueError(f"give only one of {' and '.join(given)}")
        if self.calibration.samples < PARTS:
            raise ValueError(f"give {PARTS} samples or more: two of {PARTS} are held out")
        return self

    def build_search(self) -> Search:
        """Return the search; CompressError when its name or a setting is not valid."""
        return build_search(self.search, self.search_settings)

    def build_healer(self) -> Healer:
        """Return the healer; CompressError when its name or a setting is not valid."""
        return build_healer(self.heal, self.heal_settings)

    @property
    def nothing(self) -> bool:
        """Whether no block goes."""
        return self.drop == 0 or self.layers == ()

    def most(self, depth: int) -> int:
        """Return the largest number of blocks that may go."""
        return depth - 2 if self.force else max(0, min(depth - 2, depth // LARGEST_SHARE))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise one CompressError that lists all that is wrong. No weight is read."""
        if problems := model_problems(checkpoint):
            where = f"{checkpoint.folder} cannot lose blocks: "
            problems = [where + problem for problem in problems]
        depth = int(getattr(checkpoint.hf_config, "num_hidden_layers", None) or 0)
        if self.layers is not None:
            problems += set_problems(self.layers, depth, force=self.force)
        elif self.drop is not None:
            problems += count_problems(self.drop, depth, force=self.force)
        elif depth and not self.most(depth):
            problems.append(
                f"a model of {depth} blocks has none to spare; give --layers and --force"
            )
        if problems:
            raise joined(problems)

    def identity(self) -> dict[str, Any]:
        """Return what the result depends on besides the model and the calibration text."""
        content = self.model_dump(mode="json", exclude={"calibration", "force"})
        search, healer = self.build_search(), self.build_healer()
        content["search_settings"] = search.settings.model_dump(mode="json")
        content["heal_settings"] = healer.settings.model_dump(mode="json")
        return content
