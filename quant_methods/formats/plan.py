# SPDX-License-Identifier: Apache-2.0
"""The result of calibration: what to do to each tensor of one checkpoint, small enough to keep.

A plan holds smoothing vectors and grids, and codes only where the method compensates errors
(``rounding="gptq"``). It works on a stream of Hugging Face tensors, before tensor parallelism
splits them. So one calibration serves the command line, the loader and any number of ranks, and all
of them write the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_common.checkpoints.identity import hashed
from compress_common.errors import CompressError
from compress_common.structure.names import Names
from compress_common.structure.structure import EMBEDDINGS, Structure
from quant_methods.formats.packed import PackedWeight
from quant_methods.formats.scales import with_scales_in
from quant_methods.grid import Grid, QuantizedWeight, quantize

_EMBEDDING_WEIGHTS = 1 << 22  # rounded at a time


@dataclass
class Plan:
    """How to smooth and round one checkpoint.

    Args:
        method: Name of the method that made it.
        grids: ``{linear: grid}`` of every quantized linear, by full name.
        vectors: fp32 vectors by name. ``<linear>.input`` [K] multiplies input channels.
            ``<linear>.output`` [N] divides output channels, and the bias. ``<norm>.weight``
            replaces the weight of a norm.
        shrinks: ``{linear: uint8 [N, K/group]}``: percent of the min/max range that is kept.
        codes: Linears that are rounded already.
        report: What the method wants users to see. JSON-able.
        sources: SHA-256 of every tensor of the checkpoint, see ``identity.TensorDigests``.
        rotations: ``{side: matrix}``. ``<module>.input`` turns the input channels of its weight,
            ``<module>.output`` its output channels and its bias. They follow the vectors.
        matrices: Orthogonal matrices by name, fp32 [size, size]. Each run of ``size`` channels is
            turned.
        copies: ``{tensor: source}``: tensors that the checkpoint lacks and the model then has.
        config: Keys of config.json that the transforms change.
        structure: Of the decoder. ``obtain_plan`` sets it.
        embedding: How the token embedding and lm_head are rounded; None: they stay at 16 bits. Not
            stored with the plan.
        names: How the checkpoint names tensors. Names in the plan are the inner ones, but for
            those of ``sources``. Not stored with the plan.
        evict: Called before a mismatch is reported; removes the stored plan.
    """

    method: str
    grids: dict[str, Grid]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    shrinks: dict[str, torch.Tensor] = field(default_factory=dict)
    codes: dict[str, PackedWeight] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    rotations: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    structure: Structure | None = None
    embedding: Grid | None = None
    names: Names = Names()
    evict: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def smoothed(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [N, K] of a module after all transforms, fp32, before rounding."""
        weight = weight.float()
        if (scale := self.vectors.get(f"{module}.input")) is not None:
            weight = weight * scale.to(weight.device)
        if (scale := self.vectors.get(f"{module}.output")) is not None:
            weight = weight / scale.to(weight.device)[:, None]
        if (matrix := self._matrix(f"{module}.input", weight.device)) is not None:
            weight = rotated(weight, matrix)
        if (matrix := self._matrix(f"{module}.output", weight.device)) is not None:
            weight = rotated(weight.t(), matrix).t()
        return weight

    def unfolded(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Undo ``smoothed``: the weight that does the same between original neighbors."""
        if (matrix := self._matrix(f"{module}.output", weight.device)) is not None:
            weight = rotated(weight.t(), matrix.t()).t()
        if (matrix := self._matrix(f"{module}.input", weight.device)) is not None:
            weight = rotated(weight, matrix.t())
        if (scale := self.vectors.get(f"{module}.input")) is not None:
            weight = weight / scale.to(weight.device)
        if (scale := self.vectors.get(f"{module}.output")) is not None:
            weight = weight * scale.to(weight.device)[:, None]
        return weight

    def transformed_gram(self, linear: str, gram: torch.Tensor) -> torch.Tensor:
        """Return the Gram matrix of the inputs that the weight of ``smoothed`` gets.

        Args:
            linear: Full name.
            gram: Mean outer product of the inputs of the original linear, fp32 [K, K]. Changed.
        """
        if (scale := self.vectors.get(f"{linear}.input")) is not None:
            scale = scale.to(gram.device)
            gram = gram.div_(scale[:, None]).div_(scale)
        if (matrix := self._matrix(f"{linear}.input", gram.device)) is not None:
            gram = rotated(rotated(gram, matrix).t(), matrix)
        return gram

    def _matrix(self, side: str, device: torch.device) -> torch.Tensor | None:
        name = self.rotations.get(side)
        return None if name is None else self.matrices[name].to(device)

    def shrink(self, linear: str, device: torch.device) -> torch.Tensor | None:
        """Return the clip search's result as ``quantize`` takes it, fp32 [N, K/g] in (0, 1]."""
        percents = self.shrinks.get(linear)
        return None if percents is None else percents.to(device).float() / 100

    def quantized(
        self, linear: str, weight: torch.Tensor, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """Return the rounded weight of a linear.

        Args:
            linear: Full name; also that of an embedding.
            weight: [N, K] as the checkpoint has it.
            scale_dtype: Scales are rounded to it.
        """
        if linear in EMBEDDINGS and self.embedding is not None:
            return self._quantized_embedding(linear, weight, self.embedding, scale_dtype)
        if linear in self.codes:
            return with_scales_in(self.codes[linear].unpacked().to(weight.device), scale_dtype)
        shrink = self.shrink(linear, weight.device)
        smoothed = self.smoothed(linear, weight)
        return quantize(smoothed, self.grids[linear], shrink=shrink, scale_dtype=scale_dtype)

    def _quantized_embedding(
        self, name: str, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """As ``quantized``, a few rows at a time: an embedding can be a tenth of a model."""
        return QuantizedWeight.joined(
            [
                quantize(self.smoothed(name, rows), grid, scale_dtype=scale_dtype)
                for rows in weight.split(max(1, _EMBEDDING_WEIGHTS // weight.shape[1]))
            ]
        )

    def transform(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        *,
        device: str | torch.device = "cpu",
        expected: Iterable[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
        """Check, fold and round a stream of checkpoint tensors, one tensor at a time.

        Each tensor is compared with the one that the plan was made from before anything of it is
        handed on, so no tensor is ever served with the codes of another.

        Args:
            tensors: ``(name, tensor)`` as the checkpoint has them.
            dtype: What the model will run in. Scales are rounded to it.
            device: Where tensors are rounded, and where they are handed on.
            expected: Names that the stream must hold; None: all of the plan's.

        Yields:
            ``(linear, QuantizedWeight)`` for the weight of a quantized linear, else
            ``(tensor name, tensor)``.

        Raises:
            CompressError: A tensor is not the plan's, is unknown to it, or did not come.
        """
        missing = set(self.sources if expected is None else expected)
        for name, tensor, found in hashed(tensors):
            if self.sources.get(name) != found:
                known = "has other content" if name in self.sources else "is not part of it"
                raise self._mismatch(f"{name} {known}")
            missing.discard(name)
            inner = self.names.inner(name)
            if inner is None:
                yield name, tensor.to(device)
                continue
            yield self._apply(inner, tensor.to(device), dtype)
            for copy, source in self.copies.items():
                if source == inner and self.names.outer(copy) not in self.sources:
                    yield self._apply(copy, tensor.to(device), dtype)
        if missing:
            raise self._mismatch(f"{len(missing)} tensors did not come, {min(missing)} for one")

    def _apply(
        self, name: str, tensor: torch.Tensor, dtype: torch.dtype
    ) -> tuple[str, torch.Tensor | QuantizedWeight]:
        """Return a tensor by inner name as the model takes it, under the checkpoint's name."""
        module, _, kind = name.rpartition(".")
        embedding = self.embedding is not None and module in EMBEDDINGS
        if kind == "weight" and (module in self.grids or embedding):
            return self.names.outer(module), self.quantized(module, tensor, dtype)
        outer = self.names.outer(name)
        if name in self.vectors:
            return outer, self.vectors[name].to(tensor)
        sides = (f"{module}.input", f"{module}.output")
        if not any(side in self.vectors or side in self.rotations for side in sides):
            return outer, tensor
        if kind == "weight":
            return outer, self.smoothed(module, tensor).to(tensor.dtype)
        if kind == "bias":
            bias = tensor.float()
            if (scale := self.vectors.get(sides[1])) is not None:
                bias = bias / scale.to(tensor.device)
            if (matrix := self._matrix(sides[1], tensor.device)) is not None:
                bias = rotated(bias, matrix)
            return outer, bias.to(tensor.dtype)
        return outer, tensor

    def _mismatch(self, found: str) -> CompressError:
        self.evict()
        return CompressError(
            f"the plan is not of the weights that are loaded: {found}. The checkpoint changed "
            "after it was calibrated; the stored plan is removed, start again to calibrate anew"
        )

    def layer_grids(self, prefix: str) -> dict[str, Grid]:
        """Return ``{linear: grid}`` of one decoder layer, by the names that it has there.

        Args:
            prefix: Of the layer, such as ``model.layers.3.``.
        """
        return layer_grids(self.grids, prefix)


def rotated(weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply each run of ``size`` channels of the last dimension by a matrix [size, size]."""
    return (weight.reshape(*weight.shape[:-1], -1, len(matrix)) @ matrix).reshape(weight.shape)


def layer_grids(grids: dict[str, Grid], prefix: str) -> dict[str, Grid]:
    """Return the grids of one decoder layer: see ``Plan.layer_grids``."""
    return {n.removeprefix(prefix): grid for n, grid in grids.items() if n.startswith(prefix)}
