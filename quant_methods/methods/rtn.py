# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline that every other method has to beat."""

from typing import ClassVar

from compress_common.calibration.blocks import Blocks
from compress_common.progress import Progress, silent
from quant_methods.base import Capabilities, GridSettings
from quant_methods.formats.plan import Plan


class RoundToNearest:
    """Group-wise min/max rounding without smoothing or calibration."""

    name: ClassVar[str] = "rtn"
    revision: ClassVar[int] = 3
    settings_type: ClassVar[type[GridSettings]] = GridSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        calibrates=False,
        at_load=True,
        formats=("compressed-tensors", "awq"),
        paper="",
        smooths=False,
    )

    def __init__(self, settings: GridSettings) -> None:
        self.settings = settings

    def plan(self, blocks: Blocks, progress: Progress = silent) -> Plan:
        """Give every linear its grid. Nothing is calibrated."""
        return Plan(self.name, self.settings.grids(blocks.model.config))
