# SPDX-License-Identifier: Apache-2.0
"""The interface of a rounding: one weight matrix to the codes of a grid."""

from typing import ClassVar, Protocol

import torch

from quant_methods.grid import Grid, QuantizedWeight


class Rounding(Protocol):
    """Rounds a weight so that the output of its linear changes little.

    Attributes:
        name: Short name, for progress bars and stored stages.
        needs_gram: Whether ``round`` needs the Gram matrix of the inputs.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool]

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
        """Return the rounded weight. Rows do not depend on each other.

        Args:
            weight: [N, K], after all transforms. Linears with the same inputs may be stacked along
                N, and are then rounded at once.
            grid: How it is rounded.
            gram: Mean outer product of the inputs, fp32 [K, K]; None: not known.
            shrink: Share of each group's min/max range that is kept, [N, K/group]; None: the
                rounding's own choice.
            scale_dtype: Scales are rounded to it.
            reuse_gram: Whether ``gram`` can be overwritten, which saves its memory once more.
            tokens: How many inputs ``gram`` is the mean of; None: not known.

        Raises:
            CompressError: The weight or the inputs are degenerate.
        """
        ...


def output_error(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    """Return the mean squared error of a linear's output per token, summed over its outputs.

    Args:
        weight: [N, K].
        rounded: What it became, [N, K].
        gram: Mean outer product of the inputs, [K, K].
    """
    change = rounded.float() - weight.float()
    return (change @ gram).mul_(change).sum().item()
