# SPDX-License-Identifier: Apache-2.0
"""What the commands share: consoles, options, units. Imports neither torch nor vLLM."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console

from compress_common.errors import CompressError, joined
from vllm_plugin import KEY

# compress_common.calibration.text.SELF, which would import torch. A test compares them.
SELF: Final = "self"

INTERRUPTED: Final = 130  # what typer returns after Ctrl-C
AUTO: Final = "auto"  # compress_common.calibration.placement.AUTO
_KV: Final = f"{KEY}.kv"  # the section of --additional-config
T = TypeVar("T")

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="a model folder or hub id, 16-bit safetensors")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Quantization = Annotated[
    str | None, typer.Option(help="weight method: see `vllm-compress methods`")
]
Policy = Annotated[str | None, typer.Option(help="KV policy: see `vllm-compress methods`")]
Keep = Annotated[str | None, typer.Option(help="share of the KV cache that stays, in (0, 1]")]
Budget = Annotated[
    str | None, typer.Option(help="tokens that stay per request and layer, in place of --keep")
]
ProfileFile = Annotated[Path | None, typer.Option(help="per-layer shares, in place of --keep")]
BasesFile = Annotated[Path | None, typer.Option(help="low-rank bases, for cskv")]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--text", "--calibration", help="'self' (the model samples it), or a .jsonl or text file"
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="seed of the text that the model samples; none with a text file")
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a setting of the method, KEY=VALUE; may be repeated"),
]
TensorParallelSize = Annotated[int, typer.Option(help="ranks that will serve the checkpoint")]
Plot = Annotated[Path | None, typer.Option(help="also draw it: a .png, .svg or .pdf")]
Device = Annotated[
    str,
    typer.Option(help="what computes: cpu, cuda, or auto (cuda where there is one and it fits)"),
]
AdditionalConfig = Annotated[
    str, typer.Option(help="as for `vllm serve`: a JSON object with a section 'compress'")
]


class Problems:
    """Collects errors, so that users see all of them at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def collect(self, step: Callable[[], T]) -> T | None:
        """Return what ``step`` returns, or None when it raises a CompressError, which is kept."""
        try:
            return step()
        except CompressError as error:
            self.found += error.problems
            return None

    def raise_found(self) -> None:
        """Raise one CompressError that lists what was found, if anything was."""
        if self.found:
            raise joined(self.found)


def json_object(option: str, text: str) -> dict[str, Any]:
    """Return the object that an option has.

    Raises:
        CompressError: names the option.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompressError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CompressError(f"{option} must be a JSON object, got {text}")
    return value


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """Return what ``--set KEY=VALUE`` options say: true, 0.5 and [1, 2] as JSON, the rest as text.

    Raises:
        CompressError: A pair has no ``=``.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise CompressError(f"--set {pair!r} is not KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def kv_setting(text: str) -> dict[str, Any]:
    """Return the section ``compress.kv`` that ``POLICY,KEY=VALUE,...`` describes.

    Raises:
        CompressError: a part has no ``=``.
    """
    policy, *parts = text.split(",")
    section: dict[str, Any] = {"policy": policy.strip()}
    for part in parts:
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise CompressError(
                f"--kv {text!r}: {part!r} is not KEY=VALUE; write it as --kv snap_kv,keep=0.25"
            )
        try:
            section[key] = json.loads(value)
        except json.JSONDecodeError:
            section[key] = value
    return section


def config_of(
    additional_config: str,
    policy: str | None,
    keep: str | None,
    budget: str | None,
    profile: Path | None,
    bases: Path | None,
) -> dict[str, Any]:
    """Return ``--additional-config`` with the options of a command added to it."""
    given = json_object("--additional-config", additional_config)
    files = {"profile": profile and str(profile), "bases": bases and str(bases)}
    options = {"policy": policy, "keep": keep, "budget": budget} | files
    chosen = {name: value for name, value in options.items() if value is not None}
    section = given.get(KEY) or {}
    kv = section.get("kv") or {} if isinstance(section, dict) else None
    if not chosen or not isinstance(kv, dict):  # the parser of settings says what is wrong with it
        return given
    return given | {KEY: section | {"kv": kv | chosen}}


def serve_command(model: str, tensor_parallel_size: int = 1, **kv: object) -> str:
    """Return the shell command that serves a model with settings of ``compress.kv``."""
    flags = [
        word for name, value in kv.items() for word in (f"--additional-config.{_KV}.{name}", value)
    ]
    if tensor_parallel_size > 1:
        flags += ["--tensor-parallel-size", tensor_parallel_size]
    return shlex.join(["vllm", "serve", model, *map(str, flags)])


def check_text(file: Path | str | None) -> None:
    """Raise CompressError when a text file is not there. None and 'self' are skipped."""
    if file not in (None, SELF) and not Path(str(file)).expanduser().is_file():
        raise CompressError(f"--text {file} is not a file; give a .txt or .jsonl file")


def check_writable(*paths: Path | None) -> None:
    """Raise CompressError when one of the files cannot be written. None is skipped."""
    problems = [
        f"cannot write {path}; give a file in a writable folder"
        for path in paths
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK))
    ]
    if problems:
        raise joined(problems)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` that replaces it at the end, and is removed after an error."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise CompressError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def print_written(command: str, *paths: Path | None) -> None:
    """Print which files were written, and the command that serves with them. None is skipped."""
    for path in paths:
        if path:
            out.print(f"written: {path}", highlight=False, soft_wrap=True)
    out.print(f"serve it: {command}", markup=False, highlight=False, soft_wrap=True)


def gib(size: float) -> str:
    """Return bytes as ``1.23 GiB``."""
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    """Return bytes as ``1.2 MiB``."""
    return f"{size / 2**20:,.1f} MiB"
