# SPDX-License-Identifier: Apache-2.0
"""The bits of each unit of a model, as ``vllm-compress search`` writes them."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress_common.errors import CompressError, explain, joined, nearest

SIXTEEN = 16  # a unit with so many bits is left as it is
LEVELS = (2, 3, 4, 5, 6, 7, 8, SIXTEEN)


class Allocation(BaseModel):
    """A file of bits per unit.

    Attributes:
        bits: ``{unit: bits}``, such as ``{"model.layers.3.gate_up": 4}``.
        model: ``Checkpoint.digest`` of the model that was searched; None: any with these units.
        report: What the search wants users to see.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: dict[str, int]
    model: str | None = None
    report: dict[str, Any] = Field(default_factory=dict)

    def checked(self, units: dict[str, tuple[str, ...]]) -> dict[str, int]:
        """Return ``bits`` after a comparison with a model.

        Args:
            units: ``{unit: linears}`` of the model.

        Raises:
            CompressError: A unit is not the model's, or has bits that no grid has.
        """
        problems = []
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
        if problems:
            raise joined(problems)
        return self.bits

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(self.model_dump(), indent=2) + "\n", encoding="utf-8")


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
    try:
        return Allocation.model_validate(content)
    except ValidationError as error:
        raise joined(explain(error, str(path), list(Allocation.model_fields))) from error
