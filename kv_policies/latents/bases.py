# SPDX-License-Identifier: Apache-2.0
"""The bases: low-rank factors of one model's keys and values, in one versioned safetensors file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compress_common.errors import CompressError, explain, joined
from kv_policies.budget.profile import ModelFingerprint
from kv_policies.latents.bases_header import SCHEMA, SIDES, VERSION, Header, Side
from kv_policies.latents.low_rank import Factor

_HEADER: Final = "vllm-compress"  # the key in the file's metadata


@dataclass(frozen=True)
class Bases:
    """A factor for the keys and one for the values of each compressed layer, float32.

    Keys are those before RoPE, after bias and norm: what attention would rotate.
    """

    header: Header
    factors: Mapping[tuple[int, Side], Factor]

    @property
    def ratio(self) -> Fraction:
        return self.header.ratio

    @property
    def layers(self) -> tuple[int, ...]:
        """Index in the model of each compressed layer, ascending."""
        return tuple(row.layer for row in self.header.layers)

    def ranks(self, layer: int) -> tuple[int, int]:
        """Numbers per token for its keys and for its values."""
        row = next(row for row in self.header.layers if row.layer == layer)
        return row.key_rank, row.value_rank

    def factor(self, layer: int, side: Side) -> Factor:
        return self.factors[layer, side]

    def save(self, path: str | Path) -> None:
        """Write the file; the same bases are the same bytes."""
        tensors = {
            f"layers.{layer}.{side}.{part}": tensor
            for (layer, side), factor in self.factors.items()
            for part, tensor in vars(factor).items()
        }
        metadata = {_HEADER: self.header.model_dump_json(by_alias=True)}
        # Not ``save_file``: what it writes is for its owner's eyes only, whatever the umask.
        Path(path).write_bytes(save(tensors, metadata))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: ModelFingerprint | None = None,
        layers: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> "Bases":
        """Read and check bases; with ``model``, also that they were made for it.

        layers: those that the engine can compress; None: all of the model's. weights: digest of the
        model's, as in the header; None: not compared. CompressError lists everything wrong.
        """
        name = model.name if model else "MODEL"
        again = f"make it with `vllm-compress calibrate-kv {name} --ratio RATIO`"
        try:
            with safe_open(path, framework="pt") as opened:
                header = _header(path, (opened.metadata() or {}).get(_HEADER), again)
                names = list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in names}
        except OSError as error:
            raise CompressError(f"cannot read the bases {path}: {error}; {again}") from error
        except SafetensorError as error:
            raise CompressError(
                f"{path} is damaged, cut short or not safetensors ({error}); {again}"
            ) from error
        problems = _tensor_problems(header, tensors)
        if model is not None:
            problems += _model_problems(header, model, layers, weights)
        if problems:
            raise joined([f"the bases {path}: {problem}; {again}" for problem in problems])
        factors = {
            (row.layer, side): Factor(
                *(tensors[f"layers.{row.layer}.{side}.{p}"] for p in ("encode", "decode", "mean"))
            )
            for row in header.layers
            for side in SIDES
        }
        return cls(header, factors)


def _header(path: str | Path, text: str | None, again: str) -> Header:
    try:
        content: Any = json.loads(text or "null")
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CompressError(f"{path} is not a file of KV bases (schema {SCHEMA!r}); {again}")
    if content.get("version") != VERSION:
        raise CompressError(
            f"the bases {path} have version {content.get('version')!r}, this plugin reads version "
            f"{VERSION}; {again}"
        )
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        names = [field.alias or name for name, field in Header.model_fields.items()]
        raise joined([f"{p}; {again}" for p in explain(error, str(path), names)]) from error


def _tensor_problems(header: Header, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    shapes = header.shapes()
    problems = []
    if missing := shapes.keys() - tensors.keys():
        problems.append(f"lacks {_few(missing)}")
    if extra := tensors.keys() - shapes.keys():
        problems.append(f"has {_few(extra)}, which its header does not name")
    for name in sorted(shapes.keys() & tensors.keys()):
        found, shape = tensors[name], shapes[name]
        if found.shape != shape or found.dtype != torch.float32:
            kind = str(found.dtype).removeprefix("torch.")
            problems.append(
                f"{name} is {kind} {list(found.shape)}, its header says float32 {list(shape)}"
            )
        elif not bool(torch.isfinite(found).all()):
            problems.append(f"{name} has NaN or infinity")
    return problems


def _model_problems(
    header: Header, model: ModelFingerprint, layers: Sequence[int] | None, weights: str | None
) -> list[str]:
    of = f"made for {header.model.name}, not for {model.name}"
    if differences := header.model.differences(model):
        return [f"{of}: {difference}" for difference in differences]
    problems = []
    wanted = set(range(model.num_hidden_layers) if layers is None else layers)
    found = {row.layer for row in header.layers}
    if missing := wanted - found:
        problems.append(f"lack layers {sorted(missing)}, which the engine compresses")
    if extra := found - wanted:
        problems.append(f"have layers {sorted(extra)}, which the engine cannot compress")
    if weights is not None and weights != header.weights:
        problems.append(f"{of}: its key and value projections are others (a fine-tune?)")
    return problems


def _few(names: Iterable[str]) -> str:
    """``6 tensors: a, b, c, ...``"""
    ordered = sorted(names)
    return f"{len(ordered)} tensors: {', '.join(ordered[:3])}{', ...' if len(ordered) > 3 else ''}"
