# SPDX-License-Identifier: Apache-2.0
"""The interface of an allocator: which unit of which layer gets how many bits."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.stages import Stages
from compress_common.progress import Progress, silent
from quant_methods.calibration.levels import LevelDatabase

# {unit: {bits: value}}. Units are full names, such as model.layers.3.gate_up.
Levels = Mapping[str, Mapping[int, float]]


class Probe(Protocol):
    """Measures a quantized model on calibration text, forward only."""

    def __call__(
        self, bits: Mapping[str, int], tokens: int | None = None, seed: int | None = None
    ) -> float:
        """Return the mean KL(original || quantized) of the next token, in nats per token.

        Only values of the same ``tokens`` and ``seed`` can be compared.

        Args:
            bits: ``{unit: bits}``. Units that are not named stay at 16 bits.
            tokens: Calibration tokens, rounded up to whole samples; None: all.
            seed: Chooses the samples; None: the first ones.

        Raises:
            CompressError: A unit was not rounded at these bits.
        """
        ...


class AllocatorSettings(BaseModel):
    """What the settings of all allocators have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def search_tokens(self) -> int:
        """Return the tokens of text that the allocator cannot do without."""
        return 1

    def image_tokens(self) -> int:
        """Return the tokens that the allocator wants of chats with images, where it takes them."""
        return 0


class Allocator(ABC):
    """Chooses the bits of each unit within a budget.

    Attributes:
        name: What users write.
        settings_type: The pydantic model of its settings. An instance is built from one.
        paper: Address of the paper, or "".
        needs: What it measures besides the level database, in a few words.
        takes_images: Whether it looks at ``images``. A search with images is refused for others.
        settings: Their values.
        images: Outputs of each layer of the original decoder on chats with images, [tokens, hidden]
            each; None: the search has no such chats.
        report: What ``allocate`` wants users to see. JSON-able.
        stages: Where finished parts of the search are kept.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type["AllocatorSettings"]]
    paper: ClassVar[str]
    needs: ClassVar[str] = "nothing more"
    takes_images: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.images: Sequence[torch.Tensor] | None = None
        self.report: dict[str, Any] = {}
        self.stages = Stages()

    def observe(self, blocks: Blocks, database: LevelDatabase, progress: Progress = silent) -> None:
        """Collect what ``allocate`` needs besides levels and probe, such as entropies or gradients.

        Here only where finished parts are kept.

        Args:
            blocks: The original decoder, with calibration tokens.
            database: Every unit, rounded at every level.
            progress: Called as the work advances.
        """
        self.stages = blocks.stages

    @abstractmethod
    def allocate(
        self,
        levels: Levels,
        sizes: Levels,
        budget: float,
        probe: Probe,
        progress: Progress = silent,
    ) -> dict[str, int]:
        """Return the bits of every unit, with a total size of at most ``budget``.

        Args:
            levels: Loss of each unit at each of its levels: the error of its output as a share of
                the output's energy. Falls with more bits.
            sizes: Stored bits of each unit at each level, scales and zero points included.
            budget: Stored bits of all units together.
            probe: Measures an allocation.
            progress: Called as the search advances.

        Raises:
            CompressError: The budget is below the smallest size.
        """
