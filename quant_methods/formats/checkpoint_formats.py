# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats: the tensors of a quantized linear, and the ``quantization_config``.

Stock vLLM reads both formats, so what we write also loads where this package is not installed. The
exception is a checkpoint with 2- or 3-bit linears or quantized embeddings: its config names this
package as the method, and stock vLLM refuses that by name.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from compress_common.structure.structure import EMBEDDINGS, Structure, split_units
from compress_common.structure.wrapper import generates
from quant_methods.formats.packing import to_awq, to_compressed_tensors
from quant_methods.grid import PER_CHANNEL, Grid, QuantizedWeight

_EXPERT = re.compile(r"(?<=\.)\d+(?=\\\.)")  # the index of an expert in an escaped name
# Marks a quantization_config as ours. Stock loaders ignore the key.
MARKER = "vllm_compress"
# The ``quant_method`` of a checkpoint that stock vLLM does not serve. It refuses this name.
NEEDS_PLUGIN = "vllm_compress_plugin"
# The config group of the token embedding and lm_head.
EMBEDDING_GROUP = "embeddings"
EMBEDDING_TARGETS = tuple(rf"re:.*{name.rpartition('.')[2]}$" for name in EMBEDDINGS)


@dataclass(frozen=True)
class Format:
    """How quantized linears are stored.

    Attributes:
        name: As users give it.
        config: ``config(grids, model config, marker, embedding)`` is the ``quantization_config``.
            Grids are by full name of the linear; ``embedding`` is that of the embeddings, or None.
        tensors: ``tensors(weight, scale dtype)`` are the tensors of one linear.
        uniform: Whether all linears need one group size.
    """

    name: str
    config: Callable[[dict[str, Grid], Any, dict[str, Any], Grid | None], dict[str, Any]]
    tensors: Callable[[QuantizedWeight, torch.dtype], dict[str, torch.Tensor]]
    uniform: bool


def written_by(quantization_config: Mapping[str, Any]) -> str | None:
    """Return the method that wrote a checkpoint; None: not this package.

    Args:
        quantization_config: Of its config.json.
    """
    written = quantization_config.get("quant_method") in ("compressed-tensors", NEEDS_PLUGIN)
    return (quantization_config.get(MARKER) or {}).get("method") if written else None


def quantized_problem(quantization_config: Mapping[str, Any], method: str) -> str | None:
    """Say why a method cannot take a quantized checkpoint; None: the method wrote it.

    Args:
        quantization_config: Of its config.json.
        method: Name of a weight method.
    """
    ours = written_by(quantization_config)
    if ours == method:
        return None
    return (
        f"--quantization {method} needs a 16-bit checkpoint or one written by `vllm-compress "
        f"quantize --method {method}`; this one is already quantized "
        f"({ours or quantization_config.get('quant_method')}); remove the flag to serve it as is"
    )


def whole_linears(grids: dict[str, Grid], structure: Structure) -> list[str]:
    """Return the full names of all linears of a decoder.

    Args:
        grids: ``{linear: grid}`` of those that are quantized.
        structure: Of the model.

    Raises:
        CompressError: The linears of a fused unit have several grids. vLLM dies on such a
            checkpoint without a hint.
    """
    units = structure.all_units
    if split := split_units(units, grids):
        raise CompressError(
            f"{len(split)} units have linears with different grids, {split[0]} for one; vLLM fuses "
            "the linears of a unit, so give them one number of bits and one group size"
        )
    return [linear for linears in units.values() for linear in linears]


def patterns(names: Iterable[str], structure: Structure) -> list[str]:
    """Return regular expressions that match some linears of a decoder, and no others.

    Args:
        names: Full names of the linears.
        structure: Of the model.
    """
    # End of a linear's name -> the layers that are meant, and those that have such a linear.
    layers: dict[str, dict[str, None]] = {}
    having: dict[str, set[int]] = {}
    for full in names:
        layer, name = structure.place(full)
        end = _end(name, structure)
        layers.setdefault(end, {})[str(layer)] = None
        having.setdefault(end, set()).update(structure.layers_with[name])
    everywhere = sorted(end for end, which in layers.items() if len(which) == len(having[end]))
    found = [rf"re:.*\.({'|'.join(everywhere)})$"] if everywhere else []
    somewhere: dict[tuple[str, ...], list[str]] = {}
    for end, which in layers.items():
        if len(which) < len(having[end]):
            somewhere.setdefault(tuple(which), []).append(end)
    stack = structure.layers.rpartition(".")[2]
    for some, ends in somewhere.items():
        # OPT has linears directly in a layer, others in modules of it.
        place = rf"re:(.*\.)?{stack}\.({'|'.join(some)})"
        found.append(rf"{place}\.(.*\.)?({'|'.join(sorted(ends))})$")
    return found


def _end(name: str, structure: Structure) -> str:
    """Return the end of a linear's name that no other linear of its layer has, as a pattern.

    It is the same for that linear of all routed experts, which have one grid.
    """
    last = name.rpartition(".")[2]
    if structure.ends[last] == 1:
        return last
    return _EXPERT.sub(r"\\d+", re.escape(name)) if name in structure.routed else re.escape(name)


def _left(grids: dict[str, Grid], linears: list[str], structure: Structure) -> list[str]:
    """Regular expressions of the linears that stay at 16 bits."""
    quantized = {structure.place(name)[1] for name in grids}
    nowhere = [name for name in structure.names if name not in quantized]
    rest = [n for n in linears if n not in grids and structure.place(n)[1] not in nowhere]
    outside = [rf"re:(.*\.)?{re.escape(name.rpartition('.')[2])}$" for name in structure.others]
    outside += [rf"re:(.*\.)?{re.escape(name)}\..*" for name in structure.towers]
    ends = [rf"re:.*\.{_end(name, structure)}$" for name in nowhere]
    ends += [rf"re:.*\.{re.escape(name)}$" for name in structure.kept]
    stack = structure.layers.rpartition(".")[2]
    behind = range(structure.depth, structure.depth + structure.predicting)
    ends += [rf"re:(.*\.)?{stack}\.{index}\..*" for index in behind]
    return [*dict.fromkeys([*outside, *ends]), *patterns(rest, structure)]


def _head(structure: Structure) -> str:
    """Return the head as ``ignore`` has it. vLLM names that of a wrapped model in another way."""
    return rf"re:(.*\.)?{structure.head}$" if structure.towers else structure.head


def compressed_tensors_config(
    grids: dict[str, Grid], config: Any, marker: dict[str, Any], embedding: Grid | None = None
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a compressed-tensors checkpoint.

    Args:
        grids: ``{linear: grid}`` by full name. Linears without a grid are ignored by name.
        config: The text model's ``transformers`` config.
        marker: What we note about the checkpoint.
        embedding: How the token embedding and lm_head are rounded; None: they are ignored by name.

    Raises:
        CompressError: The linears of a fused unit have several grids.
    """
    structure = structure_of(config)
    linears = whole_linears(grids, structure)
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid, []).append(name)
    groups: dict[str, dict[str, Any]] = {}
    for number, (grid, names) in enumerate(by_grid.items()):
        # A head that scores is a linear too, and vLLM does not name every one.
        everything = len(by_grid) == 1 and len(names) == len(linears) and generates(config)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if everything else patterns(names, structure)
        } | _scheme(grid)
    layouts = [_layout(grid) for grid in by_grid]
    if embedding is not None:
        groups[EMBEDDING_GROUP] = {"targets": list(EMBEDDING_TARGETS)} | _scheme(embedding)
        layouts.append(_layout(embedding))
    stored = set(layouts)
    if len(stored) > 1:
        for group, layout in zip(groups.values(), layouts, strict=True):
            group["format"] = layout
    narrow = any(grid.bits < 4 for grid in by_grid)  # unpacked into 4 bits by our loader
    ours = narrow or embedding is not None
    return {
        "quant_method": NEEDS_PLUGIN if ours else "compressed-tensors",
        "format": stored.pop() if len(stored) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [
            *([_head(structure)] if embedding is None else []),
            *_left(grids, linears, structure),
        ],
        "kv_cache_scheme": None,
        MARKER: marker,
    }


def _layout(grid: Grid) -> str:
    return "pack-quantized" if grid.packed else "int-quantized"


def _scheme(grid: Grid) -> dict[str, Any]:
    """The config group of a grid, without its targets."""
    per_channel = grid.group_size == PER_CHANNEL
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else grid.group_size,
        "dynamic": False,
    }
    activations = None
    if grid.activations != "none":
        activations = {
            "num_bits": 8,
            "type": "int" if grid.activations == "int8" else "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def _described(grid: Grid) -> str:
    rounded = "" if grid.activations == "none" else f" with {grid.activations} activations"
    per_channel = grid.group_size == PER_CHANNEL
    groups = "per channel" if per_channel else f"in groups of {grid.group_size}"
    return f"{grid.bits} bits {groups}{rounded}"


def _awq_config(
    grids: dict[str, Grid], config: Any, marker: dict[str, Any], embedding: Grid | None = None
) -> dict[str, Any]:
    if embedding is not None:
        raise CompressError(
            "the awq format has no quantized embeddings; use --format compressed-tensors, or set "
            "embeddings=none"
        )
    structure = structure_of(config)
    if structure.has_experts:
        raise CompressError(
            "the awq format was not tested with routed experts; use --format compressed-tensors"
        )
    if not generates(config):
        raise CompressError(
            "the awq format was not tested with a model that gives no logits; use --format "
            "compressed-tensors"
        )
    whole_linears(grids, structure)
    kinds = set(grids.values())
    if len(kinds) > 1 or any(grid.bits != 4 or grid.activations != "none" for grid in kinds):
        found = ", ".join(sorted(map(_described, kinds)))
        raise CompressError(
            f"the awq format has 4 bits and one group size for all linears, not {found}; use "
            "--format compressed-tensors"
        )
    names = {structure.place(name)[1] for name in grids}
    if len(grids) != sum(len(structure.layers_with[name]) for name in names):
        raise CompressError(
            "the awq format quantizes the same linears in every layer; use --format "
            "compressed-tensors for a mixed allocation"
        )
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": kinds.pop().group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [
            structure.head,
            *structure.towers,
            *(name.rpartition(".")[2] for name in structure.others),
            *(name.rpartition(".")[2] for name in structure.names if name not in names),
            *structure.kept,
        ],
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
