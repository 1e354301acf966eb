# SPDX-License-Identifier: Apache-2.0
"""What the commands share: consoles, options, units."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from compress_common.errors import CompressError
from vllm_plugin.settings import KEY

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="a model folder or hub id, 16-bit safetensors")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]
Quantization = Annotated[
    str | None, typer.Option(help="weight method: see `vllm-compress methods`")
]
Policy = Annotated[str | None, typer.Option(help="KV policy: see `vllm-compress methods`")]
Keep = Annotated[str | None, typer.Option(help="share of the KV cache that stays, in (0, 1]")]
ProfileFile = Annotated[Path | None, typer.Option(help="per-layer shares, in place of --keep")]
AdditionalConfig = Annotated[
    str, typer.Option(help="as for `vllm serve`: a JSON object with a section 'compress'")
]


def json_object(option: str, text: str) -> dict[str, Any]:
    """The object that an option holds; CompressError names the option."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompressError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CompressError(f"{option} must be a JSON object, got {text}")
    return value


def config_of(
    additional_config: str, policy: str | None, keep: str | None, profile: Path | None
) -> dict[str, Any]:
    """``--additional-config`` with the options of a command in it."""
    given = json_object("--additional-config", additional_config)
    options = {"policy": policy, "keep": keep, "profile": profile and str(profile)}
    chosen = {name: value for name, value in options.items() if value is not None}
    section = given.get(KEY) or {}
    kv = section.get("kv") or {} if isinstance(section, dict) else None
    if not chosen or not isinstance(kv, dict):  # what is wrong with it is said where it is parsed
        return given
    return given | {KEY: section | {"kv": kv | chosen}}


def gib(size: float) -> str:
    """Bytes as ``1.23 GiB``."""
    return f"{size / 2**30:.2f} GiB"
