# SPDX-License-Identifier: Apache-2.0
"""What is known of a decoder: its linears, which of them share an input, and what feeds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

# The token embedding and the head of the models whose embeddings can be quantized.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"  # of its own only where it is not tied to the embedding
EMBEDDINGS = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder layer.

    Attributes:
        name: Relative to the layer.
        outputs: Output features.
        inputs: Input features.
        shares: The first linear of the layer with the same input. Only that one is observed.
        row_parallel: Whether tensor parallelism cuts it along input channels.
    """

    name: str
    outputs: int
    inputs: int
    shares: str
    row_parallel: bool


@dataclass(frozen=True)
class Unit:
    """Linears that vLLM may fuse into one. They have one grid, or all stay at 16 bits.

    Attributes:
        name: Short name of the unit, unique in a decoder layer.
        linears: Its linears, relative to the layer. They share an input and a parent module.
    """

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """One smoothing vector: several linears read what one module writes.

    It is a candidate, found by following. ``prove`` tells whether a model allows it.

    Attributes:
        producer: The norm whose weight, or the linear whose output rows, the vector divides.
        consumers: The linears whose input channels the vector multiplies.
        from_norm: Whether the producer is a norm.
        offset: What the norm adds to its stored weight: 1 for Gemma.
        repeat: Query heads that each channel of the producer feeds; above 1 with grouped queries.
        head_dim: Channels of a head.
    """

    producer: str
    consumers: tuple[str, ...]
    from_norm: bool
    offset: float = 0.0
    repeat: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class Attention:
    """The attention of a decoder layer. Names are relative to the layer.

    Attributes:
        module: Of attention.
        norm: In front of it; None: it reads hidden states.
        query, key, value: The linears that give them; all the same where one linear does.
        output: The linear that reads what attention gives; None: several, or something between.
        key_norms: Whether queries and keys are normalized.
        head_dim: Channels of a head.
    """

    module: str
    norm: str | None
    query: str
    key: str
    value: str
    output: str | None
    key_norms: bool
    head_dim: int

    @property
    def separate(self) -> bool:
        """Whether queries, keys and values have a linear each."""
        return len({self.query, self.key, self.value}) == 3  # noqa: PLR2004 (q, k, v)


@dataclass(frozen=True)
class Structure:
    """What ``derive`` found of a decoder. Every layer is alike.

    Attributes:
        model_type: As in its config.
        layers: Name of the list of decoder layers.
        depth: How many they are.
        hidden: Channels of the hidden states.
        norm: The last norm; None: the head reads something else.
        head: The head.
        embedding: The token embedding.
        linears: Those of a layer, in the order in which they run.
        units: Of a layer.
        folds: Candidates.
        attention: Of a layer.
        rotates: Whether nothing but norms that a rotation passes reads the hidden states.
        others: Linears outside the layers, the head apart. They stay at 16 bits.
        towers: Modules beside the decoder, where it lies in another model: ``towers_of``.
    """

    model_type: str
    layers: str
    depth: int
    hidden: int
    norm: str | None
    head: str
    embedding: str
    linears: tuple[Linear, ...]
    units: tuple[Unit, ...]
    folds: tuple[Fold, ...]
    attention: Attention
    rotates: bool
    others: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    @property
    def backbone(self) -> str:
        """Name of the module that has the list of layers."""
        return self.layers.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the linears of a layer."""
        return tuple(linear.name for linear in self.linears)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{linear: (out_features, in_features)}`` of a layer."""
        return {linear.name: (linear.outputs, linear.inputs) for linear in self.linears}

    @cached_property
    def first_sharing(self) -> dict[str, str]:
        """``{linear: the first linear with the same input}``."""
        return {linear.name: linear.shares for linear in self.linears}

    @cached_property
    def row_parallel(self) -> frozenset[str]:
        """The linears that tensor parallelism cuts along input channels."""
        return frozenset(linear.name for linear in self.linears if linear.row_parallel)

    @cached_property
    def all_units(self) -> dict[str, tuple[str, ...]]:
        """``{unit: linears}`` of all layers, by full name: ``model.layers.3.gate_up``."""
        return {
            f"{self.layers}.{index}.{unit.name}": tuple(
                f"{self.layers}.{index}.{linear}" for linear in unit.linears
            )
            for index in range(self.depth)
            for unit in self.units
        }

    def place(self, linear: str) -> tuple[int, str]:
        """Return the layer of a full name, and the name that it has there."""
        index, _, name = linear.removeprefix(f"{self.layers}.").partition(".")
        return int(index), name

    def shape(self, linear: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a linear by full name."""
        return self.shapes[self.place(linear)[1]]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` was called on."""
        return cls(
            **{
                **content,
                "linears": tuple(Linear(**linear) for linear in content["linears"]),
                "units": tuple(Unit(u["name"], tuple(u["linears"])) for u in content["units"]),
                "folds": tuple(
                    Fold(**{**fold, "consumers": tuple(fold["consumers"])})
                    for fold in content["folds"]
                ),
                "attention": Attention(**content["attention"]),
                "others": tuple(content["others"]),
                "towers": tuple(content.get("towers", ())),
            }
        )


def split_units(units: Mapping[str, tuple[str, ...]], grids: Mapping[str, Any]) -> list[str]:
    """Return the units whose linears do not share one grid, which vLLM cannot load.

    Args:
        units: ``{unit: linears}``, as ``Structure.all_units`` has it.
        grids: ``{linear: grid}`` by full name. A linear without one stays at 16 bits.
    """
    return [u for u, linears in units.items() if len({grids.get(name) for name in linears}) > 1]
