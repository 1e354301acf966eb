# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest: each weight on its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant_methods.grid import Grid, QuantizedWeight, quantize


@dataclass(frozen=True)
class Nearest:
    """Round each weight to the nearest point of its group's grid."""

    name: ClassVar[str] = "nearest"
    needs_gram: ClassVar[bool] = False

    def round(
        self,
        weight: torch.Tensor,
        grid: Grid,
        gram: torch.Tensor | None = None,
        *,
        shrink: torch.Tensor | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        reuse_gram: bool = False,
        tokens: int | None = None,
    ) -> QuantizedWeight:
        """See ``Rounding``. The Gram matrix does not matter."""
        return quantize(weight, grid, shrink=shrink, scale_dtype=scale_dtype)
