# SPDX-License-Identifier: Apache-2.0
"""The header of a file of KV bases: their model, their sizes, and where they come from."""

import math
from fractions import Fraction
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from compress_common.errors import CompressError
from kv_policies.model_file import Calibration, ModelFile, Strict

SCHEMA: Final = "vllm-compress/kv-bases"
VERSION: Final = 2

# Bases that use less of what their ratio allows were made for another ratio.
_LEAST: Final = Fraction(3, 4)

Side = Literal["key", "value"]
SIDES: Final[tuple[Side, Side]] = ("key", "value")
Objective = Literal["reconstruction", "attention"]


def exact_ratio(ratio: float | str | Fraction) -> Fraction:
    """Return the share that is saved, exactly as typed: 0.8, "0.8" and "4/5" are all 4/5.

    Raises:
        CompressError: It is not a number in [0, 1).
    """
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
    """Return how many numbers a token has in a layer, for its key and value together.

    Args:
        ratio: Share that is saved.
        features: Numbers of a key, and of a value, without compression.
    """
    return max(2, math.floor((1 - ratio) * 2 * features))


Ratio = Annotated[
    Fraction, BeforeValidator(exact_ratio), PlainSerializer(str, return_type=str, when_used="json")
]


class Layer(Strict):
    """A layer's ranks, and the share of energy that they lose on the calibration text."""

    layer: int = Field(ge=0)
    key_rank: int = Field(ge=1)
    value_rank: int = Field(ge=1)
    key_error: float
    value_error: float


class Header(ModelFile):
    """What is known of the bases without their tensors.

    Attributes:
        weights: SHA-256 of the model's weights.
        ratio: Share of the cache's numbers that is saved, over all layers.
        objective: What the error of keys and values was measured by.
        layers: Ascending. Layers that are left alone, such as those with a sliding window, are not
            in it.
        calibration: Where the bases come from.
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
        """Numbers in a token's key, and in its value: F."""
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
        """Return the shape of each tensor in the file, by name. All are float32."""
        f = self.features
        return {
            f"layers.{row.layer}.{side}.{part}": shape
            for row in self.layers
            for side, rank in zip(SIDES, (row.key_rank, row.value_rank), strict=True)
            for part, shape in (("encode", (f, rank)), ("decode", (rank, f)), ("mean", (f,)))
        }
