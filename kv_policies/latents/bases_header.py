# SPDX-License-Identifier: Apache-2.0
"""What a file of KV bases says of itself: whose they are, how large, and where they come from."""

import math
from fractions import Fraction
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from compress_common.errors import CompressError
from kv_policies.model_file import Calibration, ModelFile, Strict

SCHEMA: Final = "vllm-compress/kv-bases"
VERSION: Final = 2

# Of the numbers that a ratio allows: less than that is another ratio.
_LEAST: Final = Fraction(3, 4)

Side = Literal["key", "value"]
SIDES: Final[tuple[Side, Side]] = ("key", "value")
Objective = Literal["reconstruction", "attention"]


def exact_ratio(ratio: float | str | Fraction) -> Fraction:
    """The share saved, as typed: 0.8, "0.8" and "4/5" are all 4/5. An error outside [0, 1)."""
    try:
        value = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value < 1:
        raise CompressError(
            f"ratio is the share of keys and values that is saved, a number in [0, 1), got {ratio}"
        )
    return value


def total_rank(ratio: Fraction, features: int) -> int:
    """Numbers per token and layer, keys and values together, in place of 2 * ``features``."""
    return max(2, math.floor((1 - ratio) * 2 * features))


Ratio = Annotated[
    Fraction, BeforeValidator(exact_ratio), PlainSerializer(str, return_type=str, when_used="json")
]


class Layer(Strict):
    """One layer: its ranks, and the share of energy lost on the calibration text."""

    layer: int = Field(ge=0)
    key_rank: int = Field(ge=1)
    value_rank: int = Field(ge=1)
    key_error: float
    value_error: float


class Header(ModelFile):
    """What is known of the bases without their tensors.

    weights: SHA-256 of the key and value projections of the first and the last layer.
    ratio: share of the cache's numbers that is saved, over all layers.
    layers: ascending; sliding-window layers and others that are left alone are not in it.
    """

    noun: ClassVar[str] = "bases"
    command: ClassVar[str] = "calibrate-kv {} --ratio RATIO"

    schema_name: Literal["vllm-compress/kv-bases"] = Field(SCHEMA, alias="schema")
    version: Literal[2] = VERSION
    method: Literal["cskv"] = "cskv"
    weights: str
    ratio: Ratio
    objective: Objective
    layers: tuple[Layer, ...] = Field(min_length=1)
    calibration: Calibration

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers that the bases cover."""
        return tuple(row.layer for row in self.layers)

    @property
    def features(self) -> int:
        """Numbers in a token's keys, and in its values: F."""
        return self.model.num_key_value_heads * self.model.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> "Header":
        problems = []
        indices = [row.layer for row in self.layers]
        if indices != sorted(set(indices)):
            problems.append("layers are not ascending")
        if indices[-1] >= self.model.num_hidden_layers:
            problems.append(f"layer {indices[-1]} is beyond the model's depth")
        total = total_rank(self.ratio, self.features)
        mean = Fraction(sum(row.key_rank + row.value_rank for row in self.layers), len(self.layers))
        if not _LEAST * total <= mean <= total + 1:
            problems.append(f"layers have {float(mean):g} numbers a token, ratio says {total}")
        for row in self.layers:
            if max(row.key_rank, row.value_rank) > self.features:
                problems.append(f"a rank of layer {row.layer} exceeds {self.features} features")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to it, all float32."""
        f = self.features
        return {
            f"layers.{row.layer}.{side}.{part}": shape
            for row in self.layers
            for side, rank in zip(SIDES, (row.key_rank, row.value_rank), strict=True)
            for part, shape in (("encode", (f, rank)), ("decode", (rank, f)), ("mean", (f,)))
        }
