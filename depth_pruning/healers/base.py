# SPDX-License-Identifier: Apache-2.0
"""The interface of a healer: other weights for the blocks that stay."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent

Healed = dict[int, dict[str, torch.Tensor]]  # {block: {linear: weight}}


@dataclass(frozen=True)
class Text:
    """What a healer learns from.

    Attributes:
        blocks: The original decoder, with the samples that weights are fitted to in front of those
            that choose between fits. The samples that judge the result are not among them.
        fitted: How many samples the first are.
        name: Of the set that is healed, unique among the stages of ``blocks``.
    """

    blocks: Blocks
    fitted: int
    name: str


class HealerSettings(BaseModel):
    """What the settings of all healers have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Healer(ABC):
    """Makes up for blocks that are gone.

    Attributes:
        name: What users write.
        settings_type: The pydantic model of its settings. An instance is built from one.
        paper: Address of the paper, or "".
        settings: Their values.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[HealerSettings]] = HealerSettings
    paper: ClassVar[str] = ""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def check(self, blocks: Blocks) -> None:  # noqa: B027 (most suit every decoder)
        """Raise CompressError when the healer does not suit a decoder. Called before the work.

        Args:
            blocks: The decoder, with any tokens.
        """

    @abstractmethod
    def heal(self, dropped: Collection[int], text: Text, progress: Progress = silent) -> Healed:
        """Return the new weights of linears, in the type of the model that will be served.

        Args:
            dropped: Indices of the blocks that are gone: at least one.
            text: What is learned from.
            progress: Called as the work advances.
        """


def stored_as(weight: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return a weight rounded to what the checkpoint will hold, on the host.

    Args:
        weight: Any shape.
        blocks: Know the type that the model is served in.
    """
    return weight.to(blocks.dtype).cpu()
