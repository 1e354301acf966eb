# SPDX-License-Identifier: Apache-2.0
"""The header of a file of KV bases: their model, their sizes, and where they come from."""

import math
from fractions import Fraction
from statistics import fmean
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from compress_common.errors import CompressError
from kv_policies.latents.format import Bits, LatentFormat
from kv_policies.model_file import Calibration, ModelFile, Strict

SCHEMA: Final = "vllm-compress/kv-bases"
VERSION: Final = 3

# Bases that use less of what their ratio allows were made for another ratio.
_LEAST: Final = Fraction(3, 4)
_MOST_SHARDS: Final = 1024  # bounds the work on a file that is damaged
_ITEM_BYTES: Final = 2  # of the cache that a ratio refers to

# Of the values' energy, mean over layers. In ``benchmarks.cskv --part ranks``, bases that lost 0.24
# recalled every key, and bases that lost 0.44 none.
_DOUBTFUL: Final = 0.3

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


def token_room(ratio: Fraction, features: int) -> Fraction:
    """Return the bytes that a latent token can take in a layer, in a cache of 16 bits.

    Args:
        ratio: Share of the cache's bytes that is saved.
        features: Numbers of a key, and of a value, without compression.
    """
    return (1 - ratio) * 2 * features * _ITEM_BYTES


def even_ranks(ratio: Fraction, features: int, bits: Bits) -> tuple[int, int]:
    """Return the ranks of keys and of values that fit a ratio where both are the same.

    Values have one more where the number is odd. Parameters as for ``token_room``.
    """
    room = token_room(ratio, features)
    key, value = 1, 1
    while key + value < 2 * features:
        more = (key, value + 1) if key == value else (value, value)
        if LatentFormat.token_bytes(*more, bits) > room:
            break
        key, value = more
    return key, value


def ratio_problem(ratio: Fraction, features: int, bits: Bits) -> str | None:
    """Return why no ranks suit a ratio, with the flag to change. Parameters as for ``even_ranks``.

    One number of a key and one of a value have to fit. In 4 bits all numbers fit in little room,
    and a ratio that leaves more would only seem to keep more.
    """
    room, least, most = (
        token_room(ratio, features),
        LatentFormat.token_bytes(1, 1, bits),
        LatentFormat.token_bytes(features, features, bits),
    )
    if least <= room <= most:
        return None
    whole = token_room(Fraction(0), features)
    low, high = (math.ceil(100 * (1 - most / whole)), math.floor(100 * (1 - least / whole)))
    problem = (
        f"--ratio {float(ratio):g} leaves {float(room):g} bytes a token, latents of {bits} bits "
        f"take {float(least):g} to {float(most):g}; give a ratio "
        f"from {low / 100:g} to {high / 100:g}"
    )
    return problem + (", or --bits 16" if room > most else "")


def split_problem(kv_heads: int, ranks: int) -> str | None:
    """Return why the KV heads of a layer cannot be split over ranks of tensor parallelism.

    A latent is of the heads of one rank, and all ranks have latents of the same size.
    """
    if kv_heads % ranks == 0:
        return None
    most = min(kv_heads, _MOST_SHARDS)
    allowed = [str(count) for count in range(1, most + 1) if kv_heads % count == 0]
    return (
        f"the {kv_heads} KV heads of a layer cannot be split evenly over {ranks} ranks "
        f"(--tensor-parallel-size); allowed: {', '.join(allowed)}"
    )


Ratio = Annotated[
    Fraction, BeforeValidator(exact_ratio), PlainSerializer(str, return_type=str, when_used="json")
]


class Layer(Strict):
    """A layer's ranks, and the share of energy that is lost on the calibration text.

    What rounding to the bases' bits loses is in it.
    """

    layer: int = Field(ge=0)
    key_rank: int = Field(ge=1)
    value_rank: int = Field(ge=1)
    key_error: float
    value_error: float


class Header(ModelFile):
    """What is known of the bases without their tensors.

    Attributes:
        weights: SHA-256 of the model's weights.
        bits: Of a number of a latent in the cache.
        ratio: Share of the bytes of a 16-bit cache that is saved, over all layers, scales counted.
        objective: What the error of keys and values was measured by.
        tensor_parallel: Ranks that the KV heads are split over. Each shard has factors of its own
            heads. It is not written where it is 1: files from before it existed stay valid.
        layers: Ascending. Layers that are left alone, such as those with a sliding window, are not
            in it.
        calibration: Where the bases come from.
    """

    noun: ClassVar[str] = "bases"
    command: ClassVar[str] = "calibrate-kv {}"

    schema_name: Literal["vllm-compress/kv-bases"] = Field(SCHEMA, alias="schema")
    version: Literal[3] = VERSION
    method: Literal["cskv"] = "cskv"
    weights: str
    bits: Bits
    ratio: Ratio
    objective: Objective
    tensor_parallel: int = Field(1, ge=1, le=_MOST_SHARDS, exclude_if=lambda ranks: ranks == 1)
    layers: tuple[Layer, ...] = Field(min_length=1)
    calibration: Calibration

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers that the bases cover."""
        return tuple(row.layer for row in self.layers)

    @property
    def features(self) -> int:
        """Numbers in a token's key, and in its value, in a shard: F."""
        return self.model.num_key_value_heads // self.tensor_parallel * self.model.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> "Header":
        problems = []
        indices = [row.layer for row in self.layers]
        if indices != sorted(set(indices)):
            problems.append("layers are not ascending")
        if indices[-1] >= self.model.num_hidden_layers:
            problems.append(f"layer {indices[-1]} is beyond the model's depth")
        if problem := split_problem(self.model.num_key_value_heads, self.tensor_parallel):
            raise ValueError("; ".join([*problems, problem]))  # nothing has a size then
        room = token_room(self.ratio, self.features)
        spent = [self.token_bytes(row) for row in self.layers]
        mean = sum(spent, Fraction(0)) / len(spent)
        if not _LEAST * room <= mean <= room + _ITEM_BYTES:
            problems.append(
                f"layers take {float(mean):g} bytes a token, ratio says {float(room):g}"
            )
        for row in self.layers:
            if max(row.key_rank, row.value_rank) > self.features:
                problems.append(f"a rank of layer {row.layer} exceeds {self.features} features")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def doubt(self) -> str | None:
        """Why the bases may forget, for their user; None: nothing is known that speaks for it."""
        lost = fmean(row.value_error for row in self.layers)
        if self.objective != "attention" or lost <= _DOUBTFUL:
            return None
        return (
            f"these bases lose {lost:.2f} of the energy of values; of a tiny model, bases that "
            "lost 0.24 recalled every key, and bases that lost 0.44 none: lower --ratio, or judge "
            "them with `vllm-compress eval-kv`"
        )

    def token_bytes(self, row: Layer) -> Fraction:
        """Return the bytes of a latent token in a layer and shard, in a cache of 16 bits."""
        return LatentFormat.token_bytes(row.key_rank, row.value_rank, self.bits)

    def tensor_name(self, layer: int, side: Side, shard: int, part: str) -> str:
        """Return the name of a tensor in the file.

        Args:
            layer: Index in the model.
            side: Keys or values.
            shard: Rank of tensor parallelism, whose KV heads it is for.
            part: Of a ``Factor``: "encode", "decode" or "mean".
        """
        place = "" if self.tensor_parallel == 1 else f"shards.{shard}."
        return f"layers.{layer}.{side}.{place}{part}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in the file, by name. All are float32."""
        f = self.features
        return {
            self.tensor_name(row.layer, side, shard, part): shape
            for row in self.layers
            for side, rank in zip(SIDES, (row.key_rank, row.value_rank), strict=True)
            for shard in range(self.tensor_parallel)
            for part, shape in (("encode", (f, rank)), ("decode", (rank, f)), ("mean", (f,)))
        }
