# SPDX-License-Identifier: Apache-2.0
"""Write safetensors, with the errors of files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a new file.

    Args:
        tensors: By name, contiguous and on the CPU.
        path: Of the file.
        metadata: For its header.

    Raises:
        OSError: The disk is full or refuses. safetensors has an error of its own for that, which
            is none of Python's.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
    except SafetensorError as error:
        raise OSError(str(error)) from error
