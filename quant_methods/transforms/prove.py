# SPDX-License-Identifier: Apache-2.0
"""Prove folds by running: a block gives the same in float32 with random vectors folded in."""

import copy
import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress_common.calibration.blocks import Blocks
from compress_common.structure.layer_structure import Fold, LayerStructure

# Largest change of what a block adds to its input, as a share of the largest number in that.
_TOLERANCE = 2e-4
_MATTERS = 20  # without sides that are needed, at least so many times as much changes
_SPREAD = 0.4  # of the logarithm of a random vector
_TOKENS = 32  # that a block without experts is shown: more cost time and prove nothing more
_SHOWN = 4  # names in a message

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


class Proof:
    """A float32 copy of one block, and what it gives for the first calibration sample.

    Args:
        blocks: The decoder, with calibration tokens.
        index: Of the block.
        hidden: Any hidden states of one sample, [1, length, hidden].
    """

    def __init__(self, blocks: Blocks, index: int, hidden: torch.Tensor) -> None:
        self.block = copy.deepcopy(blocks.layers[index]).to(blocks.device).float()
        vars(self.block).pop("forward", None)  # that of ``residency.widen`` runs the original
        self.hidden = hidden.to(blocks.device).float()
        self.arguments = tree_map_only(
            torch.Tensor,
            lambda t: t.float() if t.is_floating_point() else t,
            blocks.arguments(index),
        )
        self.reference = self._run()

    @torch.no_grad()
    def _run(self) -> torch.Tensor:
        """Return what the block adds to its input."""
        value = self.block(self.hidden, **self.arguments)
        return (value[0] if isinstance(value, tuple) else value) - self.hidden

    @torch.no_grad()
    def change(self, sides: Mapping[str, torch.Tensor], offsets: Mapping[str, float]) -> float:
        """Return how much the block's output changes, as a share of its largest number.

        Args:
            sides: ``{side: vector}``. ``<linear>.input`` multiplies input channels.
                ``<linear>.output`` and ``<norm>.output`` divide output channels.
            offsets: ``{norm: what it adds to its stored weight}``.
        """
        saved: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            for side, vector in sides.items():
                name, _, kind = side.rpartition(".")
                module, vector = self.block.get_submodule(name), vector.to(self.hidden)
                for parameter in module.parameters(recurse=False):
                    saved.append((parameter, parameter.data))
                    if kind == "output":
                        offset = offsets.get(name, 0.0) if parameter is module.weight else 0.0
                        shape = [-1] + [1] * (parameter.ndim - 1)
                        parameter.data = (parameter.data + offset) / vector.view(shape) - offset
                    elif parameter.ndim > 1:
                        parameter.data = parameter.data * vector
            changed = (self._run() - self.reference).abs().max()
        finally:
            for parameter, data in reversed(saved):
                parameter.data = data
        return float(changed / self.reference.abs().max())

    def unchanged(
        self,
        sides: Mapping[str, torch.Tensor],
        needed: Sequence[Collection[str]],
        offsets: Mapping[str, float] | None = None,
    ) -> bool:
        """Whether all sides together change nothing, and any without one group of needed ones do.

        A block that does not depend on a side would prove nothing about it.
        """
        offsets = offsets or {}
        error = self.change(sides, offsets)
        return error < _TOLERANCE and all(
            self.change({s: v for s, v in sides.items() if s not in group}, offsets)
            > max(_MATTERS * error, _TOLERANCE)
            for group in needed
        )

    def proves(
        self,
        shapes: Mapping[str, tuple[int, int]],
        folds: Sequence[Fold],
        *,
        apart: bool = True,
    ) -> bool:
        """Whether random vectors in all folds at once change nothing.

        Args:
            shapes: ``{linear: (out_features, in_features)}``.
            folds: Candidates.
            apart: Whether the block must depend on each producer alone, in place of all together.
        """
        sides: dict[str, torch.Tensor] = {}
        random = torch.Generator().manual_seed(0)
        for fold in folds:
            size = shapes[fold.consumers[0]][1] // fold.repeat
            vector = torch.randn(size, generator=random).mul(_SPREAD).exp()
            sides[f"{fold.producer}.output"] = vector
            wide = vector.view(-1, 1, fold.head_dim).expand(-1, fold.repeat, -1).reshape(-1)
            sides |= {f"{name}.input": wide for name in fold.consumers}
        offsets = {fold.producer: fold.offset for fold in folds if fold.from_norm}
        producers = [f"{fold.producer}.output" for fold in folds]
        needed = [[name] for name in producers] if apart else [producers]
        return self.unchanged(sides, needed, offsets)


def proved_folds(blocks: Blocks) -> list[tuple[Fold, ...]]:
    """Return the folds of each block that leave what it computes as it is.

    What is not proved is not folded: its linears are rounded as they are, and a log line says so.
    That a block depends on each producer alone is asked of the first block of each kind.

    Args:
        blocks: The decoder, with calibration tokens. The start of the first sample runs through
            each block, and all of this sample where there are experts to be reached.
    """
    tokens = blocks.tokens[:1]
    blocks = blocks.on(tokens if blocks.structure.has_experts else tokens[:, :_TOKENS])
    hidden, found = blocks.inputs(), []
    kinds: list[LayerStructure] = []
    for index in range(len(blocks)):
        kind = blocks.structure.layer(index)
        first = kind not in kinds
        if first:
            kinds.append(kind)
        shapes, candidates = kind.shapes, kind.folds
        proof, proved = Proof(blocks, index, hidden), candidates
        if not proof.proves(shapes, candidates, apart=first):
            proved = tuple(fold for fold in candidates if proof.proves(shapes, (fold,)))
        for fold in candidates:
            if fold not in proved:
                logger.warning(
                    "%s%s is not folded into %s, because the block then gives other numbers: "
                    "these linears are rounded as they are",
                    *(blocks.prefix(index), fold.producer, _listed(fold.consumers)),
                )
        found.append(proved)
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
