# SPDX-License-Identifier: Apache-2.0
"""Refuse tensors that no model computes with."""

import torch

from compress_common.errors import CompressError


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CompressError when a tensor of a checkpoint holds NaN or infinity.

    Args:
        name: Of the tensor, for the message.
        tensor: Any shape. Integers pass, and so do floats of 8 bits.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN propagates
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CompressError(
            f"{name} holds NaN or infinity; the checkpoint is damaged: fetch it again, or convert "
            "it again from the original"
        )
