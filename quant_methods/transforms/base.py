# SPDX-License-Identifier: Apache-2.0
"""The interface of a transform, which changes weights and leaves the function of a model alone."""

from typing import Protocol

from compress_common.calibration.blocks import Blocks
from quant_methods.formats.plan import Plan


class Transform(Protocol):
    """Adds changes of tensors to a plan: ``vectors``, ``rotations`` and ``copies``.

    In fp32 the transformed model gives the logits of the original. Transforms apply in the order in
    which they are added, except that rotations come after vectors.
    """

    def add(self, plan: Plan, blocks: Blocks) -> None:
        """Put the changes of every block into a plan.

        Args:
            plan: Has grids, and what was added before.
            blocks: The original decoder.

        Raises:
            CompressError: The architecture does not allow it.
        """
        ...
