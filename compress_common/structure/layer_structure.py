# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer has: its linears, which of them share an input, and what feeds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self


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
        linears: Its linears, relative to the layer. They share an input and a parent module, unless
            they are the routed experts.
    """

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """One smoothing vector: several linears read what one module writes.

    It is a candidate, found by following. ``prove`` tells whether a model allows it.

    Attributes:
        producer: The norm whose weight, or the linear whose output rows, the vector divides.
        consumers: The linears whose input channels the vector multiplies, those that stay at 16
            bits last.
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
class Experts:
    """The routed experts of a decoder layer.

    Attributes:
        module: Name of the module that has them, relative to the layer.
        count: How many they are.
        chosen: To how many of them a token goes.
    """

    module: str
    count: int
    chosen: int


@dataclass(frozen=True)
class LayerStructure:
    """What a decoder layer has, by the names that it has there.

    Attributes:
        linears: In the order in which they run.
        units: The linears that have one grid. All routed experts are one unit.
        folds: Candidates.
        kept: Linears that stay at 16 bits: what chooses or weighs experts, and those of latent
            attention. Folds reach them.
        experts: The routed experts; None: it has none.
    """

    linears: tuple[Linear, ...]
    units: tuple[Unit, ...]
    folds: tuple[Fold, ...]
    kept: tuple[str, ...] = ()
    experts: Experts | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the linears."""
        return tuple(linear.name for linear in self.linears)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{linear: (out_features, in_features)}``."""
        return {linear.name: (linear.outputs, linear.inputs) for linear in self.linears}

    @cached_property
    def first_sharing(self) -> dict[str, str]:
        """``{linear: the first linear or gate with the same input}``."""
        return {linear.name: linear.shares for linear in self.linears}

    @cached_property
    def row_parallel(self) -> frozenset[str]:
        """The linears that tensor parallelism cuts along input channels."""
        return frozenset(linear.name for linear in self.linears if linear.row_parallel)

    @cached_property
    def routed(self) -> frozenset[str]:
        """The linears of routed experts."""
        start = None if self.experts is None else f"{self.experts.module}."
        return frozenset(name for name in self.names if start and name.startswith(start))

    @cached_property
    def first_routed(self) -> dict[str, str]:
        """``{linear of a routed expert: the first of the expert with the same input}``.

        An expert's input is a choice of the tokens that ``first_sharing`` tells of.
        """
        stacks = (stack.linears for stack in self.stacks)
        return {name: names[0] for names in stacks for name in names if name in self.routed}

    @cached_property
    def stacks(self) -> tuple[Unit, ...]:
        """The units, cut into linears that share an input and a parent: they round as one."""
        return tuple(stack for unit in self.units for stack in self._cut(unit))

    def _cut(self, unit: Unit) -> list[Unit]:
        parts: dict[tuple[str, str], list[str]] = {}
        for name in unit.linears:
            key = self.first_sharing[name], name.rpartition(".")[0]
            parts.setdefault(key, []).append(name)
        if len(parts) == 1:
            return [unit]
        return [Unit(names[0], tuple(names)) for names in parts.values()]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return what ``asdict`` was called on."""
        return cls(
            linears=tuple(Linear(**linear) for linear in content["linears"]),
            units=tuple(Unit(u["name"], tuple(u["linears"])) for u in content["units"]),
            folds=tuple(
                Fold(**{**fold, "consumers": tuple(fold["consumers"])}) for fold in content["folds"]
            ),
            kept=tuple(content["kept"]),
            experts=None if content["experts"] is None else Experts(**content["experts"]),
        )
