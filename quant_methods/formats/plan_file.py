# SPDX-License-Identifier: Apache-2.0
"""A plan as one safetensors file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress_common.checkpoints.identity import tensor_digest
from compress_common.errors import CompressError
from compress_common.store import digest
from compress_common.structure.structure import Structure
from compress_common.tensor_file import save_tensors
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.plan import Plan
from quant_methods.grid import Grid

SCHEMA_VERSION = 5


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a new file."""
    header = _header(plan) | {"report": plan.report}
    save_tensors(_tensors(plan), path, metadata={"plan": json.dumps(header)})


def plan_digest(plan: Plan) -> str:
    """Return the hex SHA-256 of all that decides the quantized tensors.

    Two plans of one request can differ: another device, or other sampled text, gives other vectors.
    """
    digests = {key: tensor_digest(tensor) for key, tensor in _tensors(plan).items()}
    embedding = None if plan.embedding is None else asdict(plan.embedding)
    return digest(json.dumps([_header(plan), digests, embedding], sort_keys=True))


def _header(plan: Plan) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "method": plan.method,
        "grids": {name: asdict(grid) for name, grid in plan.grids.items()},
        "sources": plan.sources,
        "rotations": plan.rotations,
        "copies": plan.copies,
        "config": plan.config,
        "structure": None if plan.structure is None else plan.structure.to_json(),
    }


def _tensors(plan: Plan) -> dict[str, torch.Tensor]:
    # q, k and v share one vector in memory, which safetensors does not store.
    tensors = {f"vector:{name}": vector.clone() for name, vector in plan.vectors.items()}
    tensors |= {f"shrink:{name}": percents for name, percents in plan.shrinks.items()}
    tensors |= {f"matrix:{name}": matrix for name, matrix in plan.matrices.items()}
    for name, weight in plan.codes.items():
        tensors |= weight.tensors(name)
    return tensors


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        CompressError: The file is damaged or of another schema version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["plan"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if header["schema"] != SCHEMA_VERSION:
            raise CompressError(
                f"{path} has plan schema {header['schema']}, this version reads "
                f"{SCHEMA_VERSION}; delete the file to calibrate again"
            )
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CompressError(
            f"{path} is not a readable plan ({error}); delete the file to calibrate again"
        ) from error

    def named(kind: str) -> dict[str, torch.Tensor]:
        return {k.partition(":")[2]: t for k, t in tensors.items() if k.startswith(f"{kind}:")}

    grids = {name: Grid(**grid) for name, grid in header["grids"].items()}
    codes = {name: PackedWeight.taken(name, tensors, grids[name]) for name in named("codes")}
    return Plan(
        header["method"],
        grids,
        vectors=named("vector"),
        shrinks=named("shrink"),
        codes=codes,
        report=header["report"],
        rotations=header["rotations"],
        matrices=named("matrix"),
        copies=header["copies"],
        config=header["config"],
        structure=None if header["structure"] is None else Structure.from_json(header["structure"]),
        sources=header["sources"],
    )
