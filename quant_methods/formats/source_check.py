# SPDX-License-Identifier: Apache-2.0
"""Look at a model folder before an engine reads it, which takes a minute to find damage."""

from pathlib import Path

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.folder import read_config
from compress_common.errors import CompressError
from quant_methods.formats.checkpoint_formats import quantized_problem, written_by


def check_source(folder: Path, method: str | None) -> None:
    """Refuse a folder that a weight method cannot take, or whose weights are incomplete.

    Reads config.json and the headers of the weights, and of these nothing for a folder that is
    neither quantized by this package nor to be.

    Args:
        folder: Of a model.
        method: The weight method that quantizes it at load; None: none.

    Raises:
        CompressError: Quantized by another method; a weight file is missing or damaged.
    """
    quantized = read_config(folder).get("quantization_config") or {}
    if method is not None and quantized and (problem := quantized_problem(quantized, method)):
        raise CompressError(problem)
    if method is not None or written_by(quantized):
        Checkpoint(folder)
