# SPDX-License-Identifier: Apache-2.0
"""The names of a language model's tensors: in a checkpoint, and in ``transformers``' class for it.

Plans, grids and folds have the names of the class: the inner names. A checkpoint of a wrapped model
has others, and so has that of an embedding model, whose names begin behind the class' ``model.``.
Which ones is found from the tensors themselves, so no table of models is needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from compress_common.errors import CompressError
from compress_common.structure.structure import Structure


@dataclass(frozen=True)
class Names:
    """Translates names of tensors and modules.

    Attributes:
        backbone: ``(outer, inner)``: what the names of the language model begin with, dot included.
        head: ``(outer, inner)`` of the head, without a dot; None: the checkpoint has none.
        towers: Modules beside the language model.
        parts: The modules of the language model without a head, where nothing else tells its names
            from others.

    Without towers and parts the checkpoint is a language model, and every name is the same in both.
    """

    backbone: tuple[str, str] = ("", "")
    head: tuple[str, str] | None = None
    towers: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def inner(self, name: str) -> str | None:
        """Return the inner name of what a checkpoint names; None: it lies beside the decoder."""
        if not (self.towers or self.parts):
            return name
        if self.head is not None and name.startswith(f"{self.head[0]}."):
            return self.head[1] + name.removeprefix(self.head[0])
        outer, inner = self.backbone
        rest = name.removeprefix(outer)
        first = rest.partition(".")[0]
        inside = name.startswith(outer) and first not in self.towers
        inside = inside and (not self.parts or first in self.parts)
        return inner + rest if inside else None

    def outer(self, name: str) -> str:
        """Return what a checkpoint names the tensor or module of an inner name."""
        if not (self.towers or self.parts):
            return name
        if self.head is not None and name.startswith(self.head[1]):
            return self.head[0] + name.removeprefix(self.head[1])
        outer, inner = self.backbone
        return outer + name.removeprefix(inner)


def names_of(tensors: Iterable[str], structure: Structure | None) -> Names:
    """Find how a checkpoint names the tensors of a language model.

    Args:
        tensors: The names of all tensors.
        structure: Of the language model; None: it is not known.

    Returns:
        Names that change nothing where the language model is not known or not among the tensors:
        ``decoder_problem`` then says so.

    Raises:
        CompressError: There is more than one language model or head.
    """
    if structure is None:
        return Names()
    if not structure.towers:
        return _body(set(tensors), structure)
    every, stack = set(tensors), structure.layers.rpartition(".")[2]
    ends = (0, structure.depth - 1)
    first = [f"{stack}.{i}.{structure.layer(i).names[0]}." for i in ends]
    modules = {name.rpartition(".")[0] + "." for name in every}
    found = sorted(
        {name.removesuffix(first[0]) for name in modules if name.endswith(first[0])}
        & {name.removesuffix(first[1]) for name in modules if name.endswith(first[1])}
    )
    whole = [
        prefix
        for prefix in found
        if all(f"{prefix}{stack}.0.{linear}." in modules for linear in structure.layer(0).names)
    ]
    if not whole:
        return Names()
    if len(whole) > 1:
        raise CompressError(f"it has {len(whole)} language models: {', '.join(whole)}")
    parts = whole[0].split(".")[:-1]
    places = (".".join([*parts[:end], structure.head]) for end in range(len(parts) + 1))
    heads = [place for place in places if f"{place}." in modules]
    if len(heads) > 1:
        raise CompressError(f"it has {len(heads)} heads: {', '.join(heads)}")
    return Names(
        backbone=(whole[0], f"{structure.backbone}."),
        head=(heads[0], structure.head) if heads else None,
        towers=structure.towers,
    )


def _body(tensors: set[str], structure: Structure) -> Names:
    """Return the names of a language model that was saved without its head: ``layers.0.``."""
    outside = f"{structure.backbone}."
    stack = structure.layers.removeprefix(outside)
    first = structure.layer(0).names[0]  # Mistral's own files have other names in layers.0 too
    modules = {name.rpartition(".")[0] for name in tensors}
    if f"{structure.layers}.0.{first}" in modules or f"{stack}.0.{first}" not in modules:
        return Names()
    known = (structure.layers, structure.embedding, structure.norm or "")
    parts = [name.removeprefix(outside).partition(".")[0] for name in known if name]
    head = structure.head
    return Names(
        backbone=("", outside),
        head=(head, head) if f"{head}.weight" in tensors else None,
        parts=tuple(parts),
    )
