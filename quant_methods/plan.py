# SPDX-License-Identifier: Apache-2.0
"""The result of calibration: what to do to each tensor of a checkpoint, small enough to cache.

A plan holds smoothing vectors and grids, and int4 codes only where the method compensates errors
(``rounding="gptq"``). It works on a stream of Hugging Face
tensors, before tensor parallelism splits them, so that one calibration serves the CLI, the loader
and any number of ranks, and all of them write the same bits.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress_common.errors import CompressError
from quant_methods.grid import Grid, QuantizedWeight, quantize
from quant_methods.packing import pack_int32, unpack_int32

SCHEMA_VERSION = 1


@dataclass
class Plan:
    """How to smooth and round one model.

    ``grids``: quantised linear -> grid. ``vectors``: fp32 vectors by name:
    ``<linear>.input`` [K] multiplies input channels, ``<linear>.output`` [N] divides output
    channels (bias too), ``<norm>.weight`` replaces the norm's weight. ``shrinks``:
    linear -> uint8 [N, K/g], percent of the min/max range that is kept. ``codes``: linears that
    are rounded already. ``report``: what the method wants users to see, JSON-able.
    """

    method: str
    grids: dict[str, Grid]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    shrinks: dict[str, torch.Tensor] = field(default_factory=dict)
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def smoothed(self, linear: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight [N, K] of a linear after folding, fp32, before rounding."""
        weight = weight.float()
        if (scale := self.vectors.get(f"{linear}.input")) is not None:
            weight = weight * scale.to(weight.device)
        if (scale := self.vectors.get(f"{linear}.output")) is not None:
            weight = weight / scale.to(weight.device)[:, None]
        return weight

    def unfolded(self, linear: str, weight: torch.Tensor) -> torch.Tensor:
        """Inverse of ``smoothed``: the weight that does the same between unfolded neighbours."""
        if (scale := self.vectors.get(f"{linear}.input")) is not None:
            weight = weight / scale.to(weight.device)
        if (scale := self.vectors.get(f"{linear}.output")) is not None:
            weight = weight * scale.to(weight.device)[:, None]
        return weight

    def shrink(self, linear: str, device: torch.device) -> torch.Tensor | None:
        """The clip search's result as ``quantize`` takes it, fp32 [N, K/g] in (0, 1]."""
        percents = self.shrinks.get(linear)
        return None if percents is None else percents.to(device).float() / 100

    def quantized(
        self, linear: str, weight: torch.Tensor, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """The rounded weight of a linear."""
        grid = self.grids[linear]
        if weight.shape[1] % grid.group_size:
            raise CompressError(
                f"{linear} has input size {weight.shape[1]}, which the plan's group size "
                f"{grid.group_size} does not divide: the plan is of another model"
            )
        if linear in self.codes:
            return self.codes[linear].to(weight.device)
        shrink = self.shrink(linear, weight.device)
        return quantize(self.smoothed(linear, weight), grid, shrink=shrink, scale_dtype=scale_dtype)

    def transform(
        self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
        """Fold and round a stream of checkpoint tensors, one tensor at a time.

        ``dtype`` is what the model will run in: scales are rounded to it.
        A quantised linear's weight comes out as ``(linear, QuantizedWeight)``, everything else as
        ``(tensor name, tensor)``.
        """
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in self.grids:
                yield module, self.quantized(module, tensor, dtype)
            elif name in self.vectors:
                yield name, self.vectors[name].to(tensor)
            elif kind == "bias" and f"{module}.output" in self.vectors:
                scale = self.vectors[f"{module}.output"].to(tensor.device)
                yield name, (tensor.float() / scale).to(tensor.dtype)
            else:
                yield name, tensor

    def layer_grids(self) -> dict[str, Grid]:
        """The grids by linear of a decoder layer: they are the same in every layer."""
        return {name.split(".", 3)[3]: grid for name, grid in self.grids.items()}

    def require(self, tensors: Iterable[str]) -> None:
        """CompressError when a weight of the plan is not among the names of a checkpoint."""
        have = set(tensors)
        if missing := sorted(n for n in self.grids if f"{n}.weight" not in have):
            raise CompressError(
                f"the checkpoint lacks {len(missing)} of {len(self.grids)} weights, "
                f"{missing[0]}.weight for one: incomplete, or of another model"
            )

    def save(self, path: Path) -> None:
        """Write the plan as one safetensors file, atomically."""
        # q, k and v share one vector in memory, which safetensors does not store.
        tensors = {f"vector:{k}": v.clone() for k, v in self.vectors.items()}
        tensors |= {f"shrink:{k}": v for k, v in self.shrinks.items()}
        for name, weight in self.codes.items():
            tensors[f"codes:{name}"] = pack_int32(weight.q)
            tensors[f"scale:{name}"] = weight.scale
            tensors[f"zero:{name}"] = weight.zero.to(torch.uint8)
        header = {
            "schema": SCHEMA_VERSION,
            "method": self.method,
            "grids": {k: asdict(g) for k, g in self.grids.items()},
            "report": self.report,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"plan": json.dumps(header)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan; CompressError when it is damaged or of another schema version."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["plan"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if header["schema"] != SCHEMA_VERSION:
                raise CompressError(
                    f"{path} has plan schema {header['schema']}, this version reads "
                    f"{SCHEMA_VERSION}; delete the file to calibrate again"
                )
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CompressError(
                f"{path} is not a readable plan ({error}); delete the file to calibrate again"
            ) from error

        def of(kind: str) -> dict[str, torch.Tensor]:
            return {k.partition(":")[2]: t for k, t in tensors.items() if k.startswith(kind)}

        grids = {name: Grid(**grid) for name, grid in header["grids"].items()}
        scales, zeros = of("scale:"), of("zero:")
        codes = {
            name: QuantizedWeight(
                unpack_int32(words), scales[name], zeros[name].float(), grids[name]
            )
            for name, words in of("codes:").items()
        }
        return cls(header["method"], grids, of("vector:"), of("shrink:"), codes, header["report"])
