# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats: the tensors of a quantized linear, and the ``quantization_config``.

Stock vLLM reads both formats, so what we write also loads where this package is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress_common.errors import CompressError
from quant_methods.architecture import LINEARS
from quant_methods.formats.packing import to_awq, to_compressed_tensors
from quant_methods.grid import Grid, QuantizedWeight

# Marks a quantization_config as ours. Stock loaders ignore the key.
MARKER = "vllm_compress"


@dataclass(frozen=True)
class Format:
    """How int4 linears are stored.

    Attributes:
        name: As users give it.
        config: ``config(grids by linear of a layer, marker)`` is the ``quantization_config``.
        tensors: ``tensors(weight, scale dtype)`` are the tensors of one linear.
        uniform: Whether all linears need one group size.
    """

    name: str
    config: Callable[[dict[str, Grid], dict[str, Any]], dict[str, Any]]
    tensors: Callable[[QuantizedWeight, torch.dtype], dict[str, torch.Tensor]]
    uniform: bool


def _left(grids: dict[str, Grid]) -> list[str]:
    """The last names of the linears that stay at 16 bits, such as ``down_proj``."""
    return [name.rpartition(".")[2] for name in LINEARS if name not in grids]


def compressed_tensors_config(grids: dict[str, Grid], marker: dict[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a ``pack-quantized`` checkpoint.

    Args:
        grids: ``{linear of a decoder layer: grid}``. Linears without a grid are ignored by name.
        marker: What we note about the checkpoint.
    """
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid, []).append(name.rpartition(".")[2])
    groups = {}
    for number, (grid, names) in enumerate(by_grid.items()):
        everything = len(by_grid) == 1 and len(names) == len(LINEARS)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if everything else [rf"re:.*\.({'|'.join(sorted(names))})$"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "group",
                "group_size": grid.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(rf"re:.*\.{name}$" for name in _left(grids))],
        "kv_cache_scheme": None,
        MARKER: marker,
    }


def _awq_config(grids: dict[str, Grid], marker: dict[str, Any]) -> dict[str, Any]:
    sizes = {grid.group_size for grid in grids.values()}
    if len(sizes) > 1:
        raise CompressError(f"the awq format has one group size for all linears, not {sizes}")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *_left(grids)],
        MARKER: marker,
    }


FORMATS = {
    entry.name: entry
    for entry in (
        Format(
            "compressed-tensors", compressed_tensors_config, to_compressed_tensors, uniform=False
        ),
        Format("awq", _awq_config, to_awq, uniform=True),
    )
}
