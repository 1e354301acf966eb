# SPDX-License-Identifier: Apache-2.0
"""The bits of each unit of a model, as ``vllm-compress search`` writes them."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress_common.errors import CompressError, explain, joined, nearest
from quant_methods.grid import SIXTEEN

SCHEMA: Final = "vllm-compress/allocation"
VERSION: Final = 1
_SHOWN = 4  # problems of one kind that are listed
LEVELS = (2, 3, 4, 5, 6, 7, 8, SIXTEEN)


class Allocation(BaseModel):
    """A file of bits per unit.

    Attributes:
        bits: ``{unit: bits}``, such as ``{"model.layers.3.gate_up": 4}``.
        model: ``Checkpoint.weights_digest`` of the model that was searched; None: written by hand,
            for any model with these units.
        grid: Settings of grids that the search counted with, such as ``{"group_size": 64}``. Other
            settings would give other sizes.
        report: What the search wants users to see.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_name: Literal["vllm-compress/allocation"] = Field(SCHEMA, alias="schema")
    version: Literal[1] = VERSION
    model: str | None = None
    grid: dict[str, Any] = Field(default_factory=dict)
    bits: dict[str, int] = Field(min_length=1)
    report: dict[str, Any] = Field(default_factory=dict)

    def check_model(self, weights_digest: str) -> None:
        """Raise CompressError when another model was searched.

        Args:
            weights_digest: ``Checkpoint.weights_digest`` of the model that is to be quantized.
        """
        if self.model is not None and self.model != weights_digest:
            raise CompressError(
                "the allocation is of another model: it was searched on weights with the digest "
                f"{self.model[:12]}, these have {weights_digest[:12]}; give the model that was "
                "searched, or run `vllm-compress search` on this one"
            )

    def check_grid(self, settings: dict[str, Any]) -> None:
        """Raise CompressError when the search counted the bits of other grids.

        Args:
            settings: All settings of the grids.
        """
        problems = [
            f"the allocation was searched with {key} {value}, not {settings[key]}; set {key} to "
            f"{value}, or search again"
            for key, value in self.grid.items()
            if key in settings and settings[key] != value
        ]
        if problems:
            raise joined(problems)

    def check_packs(self, fit: Collection[str], ranks: int) -> None:
        """Raise CompressError when units would stay at 16 bits that are given fewer.

        Args:
            fit: Units whose channels pack in the bits that they are given.
            ranks: That serve the model.
        """
        left = [unit for unit, bits in self.bits.items() if bits != SIXTEEN and unit not in fit]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CompressError(
                f"the allocation gives {left[0]}{more} {self.bits[left[0]]} bits, in which its "
                f"channels on {ranks} ranks do not pack; give it 16 bits, or others"
            )

    def checked(self, units: dict[str, tuple[str, ...]]) -> dict[str, int]:
        """Return ``bits`` after a comparison with a model.

        Args:
            units: ``{unit: linears}`` of the model.

        Raises:
            CompressError: A unit is not the model's, or has bits that no grid has. A unit of the
                model is missing in a file that a search wrote, which names all.
        """
        problems = []
        if self.model is not None and (
            missing := [unit for unit in units if unit not in self.bits]
        ):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            problems.append(
                f"the allocation was searched, and has no bits for {missing[0]}{more}; search "
                "again, or remove its 'model' if you mean to give bits by hand"
            )
        linears = {name: unit for unit, names in units.items() for name in names}
        for name, bits in self.bits.items():
            if name in linears and name not in units:
                problems.append(
                    f"the allocation names {name!r} alone; vLLM fuses it, so give the bits of its "
                    f"unit {linears[name]!r}"
                )
            elif name not in units:
                problems.append(
                    f"the allocation names {name!r}, which this model does not have"
                    f"{nearest(name, units)}"
                )
            elif bits not in LEVELS:
                problems.append(
                    f"the allocation gives {name} {bits} bits; valid: {', '.join(map(str, LEVELS))}"
                )
        if len(problems) > _SHOWN:
            problems = [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} problems like these"]
        if problems:
            raise joined(problems)
        return self.bits

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(
            json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n",
            encoding="utf-8",
        )


def read_allocation(path: str | Path) -> Allocation:
    """Read a file of bits per unit.

    Raises:
        CompressError: The file cannot be read, or is none.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"cannot read the allocation {path}: {error.strerror}") from error
    except ValueError as error:
        raise CompressError(f"the allocation {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CompressError(f"the allocation {path} is not a JSON object")
    try:
        return Allocation.model_validate(content)
    except ValidationError as error:
        raise joined(explain(error, str(path), list(Allocation.model_fields))) from error
