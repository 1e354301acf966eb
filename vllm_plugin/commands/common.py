# SPDX-License-Identifier: Apache-2.0
"""What the commands share: consoles, options, units."""

from typing import Annotated

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="a model folder or hub id, 16-bit safetensors")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]


def gib(size: float) -> str:
    """Bytes as ``1.23 GiB``."""
    return f"{size / 2**30:.2f} GiB"
