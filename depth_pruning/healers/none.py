# SPDX-License-Identifier: Apache-2.0
"""none: the blocks that stay keep their weights. The control."""

from collections.abc import Collection
from typing import ClassVar

from compress_common.progress import Progress, silent
from depth_pruning.healers.base import Healed, Healer, Text


class NoHealer(Healer):
    """Changes nothing."""

    name: ClassVar[str] = "none"

    def heal(self, dropped: Collection[int], text: Text, progress: Progress = silent) -> Healed:
        """See ``Healer``."""
        return {}
