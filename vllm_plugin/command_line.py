# SPDX-License-Identifier: Apache-2.0
"""Command lines of ``vllm serve``: mistakes that vLLM meets late, or without a word."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vllm_plugin.settings import KEY

_FLAG = "--additional-config"


def mixed_forms(arguments: Sequence[str]) -> list[str]:
    """Refuse JSON, or the file of ``--config``, beside dotted flags: vLLM keeps only the latter.

    Args:
        arguments: of a command line; of another program than vLLM if it embeds an engine.
    """
    dotted, whole = [], []
    for flag, value in _flags(arguments):
        if flag == _FLAG:
            whole.append(value)
        elif flag.startswith(f"{_FLAG}."):
            dotted.append(flag.removeprefix(f"{_FLAG}."))
    if not dotted:  # no file is read then
        return []
    given = [("as JSON", text) for text in whole]
    name = _FLAG.removeprefix("--")
    given += [
        ("in the file of --config", str(_content(file).get(name) or ""))
        for file in _files(arguments)
    ]
    ours = any(path.partition(".")[0] == KEY for path in dotted)
    return [
        f"{_FLAG} is given {where} and with dotted flags, and vLLM keeps only the dotted flags "
        "then; write all of it in one way"
        for where, text in given
        if text and (ours or KEY in text)
    ]


def name_problems(model: str) -> list[str]:
    """List what is wrong with the name of a model before anything looks for it.

    Args:
        model: a folder or a hub id.
    """
    path = Path(model)
    if model != model.strip():
        return [f"the model {model!r} has spaces around its name; remove them"]
    if model.startswith(("/", "./", "../")) and not path.exists():
        return [f"the model folder {model!r} does not exist; give a folder or a hub id"]
    if path.is_file():
        problem = (
            f"the model {model!r} is a file; give the folder or hub id of a 16-bit checkpoint in "
            "safetensors"
        )
        return [problem]
    return []


def overridden(arguments: Sequence[str], preset: Mapping[str, Any]) -> list[str]:
    """List what a preset would override in files of ``--config``: vLLM lets flags win.

    Args:
        arguments: of a command line.
        preset: what it says, by name of flag.
    """
    return [
        f"--config {file} has {name!r}, and so does the preset; remove it from the file, or leave "
        "out --preset"
        for file in _files(arguments)
        for name in sorted(preset.keys() & _content(file).keys())
    ]


def with_additional_config(arguments: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Return a command line with this ``--additional-config`` in place of all that it says of it.

    Args:
        arguments: of a command line. A file of ``--config`` is overridden.
        config: the whole of it.
    """
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag != _FLAG and not flag.startswith(f"{_FLAG}."):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return [*kept, _FLAG, json.dumps(config)]


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word as a flag, spelled with dashes, and the value that it would have."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        yield flag.replace("_", "-"), value if equals else following


def _files(arguments: Sequence[str]) -> list[Path]:
    return [Path(value) for flag, value in _flags(arguments) if flag == "--config"]


def _content(file: Path) -> dict[str, Any]:
    """What a file of ``--config`` has, by name of flag. vLLM says what is wrong with a file."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {str(key).replace("_", "-"): value for key, value in content.items()}
    return {}
