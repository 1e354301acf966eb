# SPDX-License-Identifier: Apache-2.0
"""The table of ``benchmarks.models`` in docs/models.md: written by the command, read by tests."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.architectures import FAMILIES

COLUMNS = ("stock", "kv", "weights")
_BEGIN, _END = "<!-- benchmarks.models -->", "<!-- end -->"
_HEAD = (
    "| model | architecture | stock vLLM against transformers | `snap_kv` | int4 weights |",
    "|---|---|---|---|---|",
)


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table.

    Args:
        rows: For each family the text of each column's cell.
    """
    lines = [
        f"| {family} | `{FAMILIES[family].architecture}` | "
        + " | ".join(cells[column] for column in COLUMNS)
        + " |"
        for family, cells in rows.items()
    ]
    return "\n".join((*_HEAD, *lines))


def write(document: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Put the table in place of the one that a document has."""
    before, rest = document.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    document.write_text(f"{before}{_BEGIN}\n{markdown(rows)}\n{_END}{after}", encoding="utf-8")


def read(document: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a document's table."""
    table = document.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0]
    rows = {}
    for line in table.strip().splitlines()[len(_HEAD) :]:
        family, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[family] = dict(zip(COLUMNS, cells, strict=True))
    return rows
