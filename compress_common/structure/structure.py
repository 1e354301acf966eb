# SPDX-License-Identifier: Apache-2.0
"""What is known of a decoder: its layers, and what lies around them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from compress_common.structure.layer_structure import Attention, LayerStructure, Unit

# The token embedding and the head of the models whose embeddings can be quantized.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"  # of its own only where it is not tied to the embedding
EMBEDDINGS = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Structure:
    """What ``derive`` found of a decoder.

    Layers are alike, or some have experts and others none. A linear that two kinds of layers have
    is the same in both.

    Attributes:
        model_type: As in its config.
        layers: Name of the list of decoder layers.
        kinds: The kinds of layers.
        pattern: Index of the kind of each layer.
        hidden: Channels of the hidden states.
        norm: The last norm; None: the head reads something else.
        head: The head.
        embedding: The token embedding.
        attention: Of a layer; None: it is latent (MLA), and its linears stay at 16 bits.
        rotates: Whether nothing but norms that a rotation passes reads the hidden states.
        others: Linears outside the layers, the head apart. They stay at 16 bits.
        towers: Modules beside the decoder, where it lies in another model: ``towers_of``.
        predicting: Layers of a checkpoint behind the decoder's, which predict further tokens. They
            stay at 16 bits.
    """

    model_type: str
    layers: str
    kinds: tuple[LayerStructure, ...]
    pattern: tuple[int, ...]
    hidden: int
    norm: str | None
    head: str
    embedding: str
    attention: Attention | None
    rotates: bool
    others: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    predicting: int = 0

    def layer(self, index: int) -> LayerStructure:
        """Return what a layer has."""
        return self.kinds[self.pattern[index]]

    @property
    def depth(self) -> int:
        """How many decoder layers it has."""
        return len(self.pattern)

    @property
    def backbone(self) -> str:
        """Name of the module that has the list of layers."""
        return self.layers.rpartition(".")[0]

    @property
    def has_experts(self) -> bool:
        """Whether a layer has routed experts."""
        return any(kind.experts is not None for kind in self.kinds)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the linears that a layer can have."""
        return tuple(dict.fromkeys(name for kind in self.kinds for name in kind.names))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{linear: (out_features, in_features)}`` of the linears that a layer can have."""
        return {name: shape for kind in self.kinds for name, shape in kind.shapes.items()}

    @cached_property
    def row_parallel(self) -> frozenset[str]:
        """Of the linears that a layer can have, those that are cut along input channels."""
        return frozenset().union(*(kind.row_parallel for kind in self.kinds))

    @cached_property
    def routed(self) -> frozenset[str]:
        """Of the linears that a layer can have, those of routed experts."""
        return frozenset().union(*(kind.routed for kind in self.kinds))

    @cached_property
    def ends(self) -> Counter[str]:
        """How many of the linears that a layer can have share the last part of their name."""
        return Counter(name.rpartition(".")[2] for name in self.names)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """The linears that a layer can have, and that stay at 16 bits."""
        return tuple(dict.fromkeys(name for kind in self.kinds for name in kind.kept))

    @cached_property
    def layers_with(self) -> dict[str, tuple[int, ...]]:
        """``{linear: indices of the layers that have it}``."""
        found: dict[str, list[int]] = {}
        for index in range(self.depth):
            for name in self.layer(index).names:
                found.setdefault(name, []).append(index)
        return {name: tuple(which) for name, which in found.items()}

    @cached_property
    def all_units(self) -> dict[str, tuple[str, ...]]:
        """``{unit: linears}`` of all layers, by full name: ``model.layers.3.gate_up``."""
        return {
            f"{self.layers}.{index}.{unit.name}": tuple(
                f"{self.layers}.{index}.{linear}" for linear in unit.linears
            )
            for index in range(self.depth)
            for unit in self.layer(index).units
        }

    def unit(self, name: str) -> Unit:
        """Return a unit by full name."""
        index, short = self.place(name)
        return next(unit for unit in self.layer(index).units if unit.name == short)

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
                "kinds": tuple(LayerStructure.from_json(kind) for kind in content["kinds"]),
                "pattern": tuple(content["pattern"]),
                "attention": content["attention"] and Attention(**content["attention"]),
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
