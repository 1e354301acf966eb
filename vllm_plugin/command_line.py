# SPDX-License-Identifier: Apache-2.0
"""Command lines of ``vllm serve``: mistakes that vLLM meets late, or without a word.

Imports neither torch nor vLLM.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vllm_plugin import KEY

NO_MODEL = "no model is given: name a folder or a hub id, or have it in --config"
_FLAG = "--additional-config"
# What vLLM does not log either.
_SECRETS = ("--api-key", "--hf-token", "--watermark-config")


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


def json_beside_preset(arguments: Sequence[str], preset: str) -> list[str]:
    """Refuse JSON beside a preset, whose settings are dotted flags: vLLM drops the JSON then.

    Args:
        arguments: of a command line, without the flags of the preset.
        preset: its name.
    """
    problems = []
    for flag, text in _flags(arguments):
        if flag == _FLAG:
            words: list[str] = []
            with suppress(json.JSONDecodeError):
                words = list(_dotted(_FLAG, json.loads(text)))
            dotted = shlex.join(words) or f"dotted flags too, such as {_FLAG}.{KEY}.kv.keep 0.25"
            problems.append(
                f"--preset {preset} sets {_FLAG} with dotted flags, and vLLM drops JSON beside "
                f"them; in place of the JSON, write {dotted}"
            )
    return problems


def _dotted(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, content in value.items():
            yield from _dotted(f"{name}.{key}", content)
    elif name != _FLAG:
        yield from (name, value if isinstance(value, str) else json.dumps(value))


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


def file_problems(arguments: Sequence[str]) -> list[str]:
    """List the files of ``--config`` that cannot be read as flags and their values."""
    problems = [
        f"{argument}: vLLM ignores the file of --config behind `=`; write `--config FILE`"
        for argument in arguments
        if argument.startswith("--config=")
    ]
    for file in _files(arguments):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--config {file}: {getattr(error, 'strerror', None) or error}")
        except yaml.YAMLError as error:
            problems.append(f"the file of --config is not YAML: {' '.join(str(error).split())}")
        else:
            if not isinstance(content, dict):
                problems.append(
                    f"--config {file} has no flags; write one on each line, such as `port: 8000`"
                )
    return problems


def flag_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the value of each flag without dots, spelled with dashes; flags win over files.

    Args:
        arguments: of a command line. A flag that takes no value gets the word behind it.
    """
    values: dict[str, Any] = {}
    for file in _files(arguments):
        values |= {f"--{name}": value for name, value in _content(file).items()}
    given = {flag: value for flag, value in _flags(arguments) if flag.startswith("--")}
    return values | {flag: value for flag, value in given.items() if "." not in flag}


def model_of(arguments: Sequence[str]) -> str | None:
    """Return the model that a command line names first, by ``--model`` or in a file.

    Returns:
        None: it names none, or only vLLM's parser can tell.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    model = flag_values(arguments).get("--model")
    return None if model is None else str(model)


def additional_config_of(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return ``--additional-config`` as vLLM will read it; None: only vLLM's parser can tell.

    Args:
        arguments: of a command line without ``mixed_forms``.
    """
    dotted = [(flag, value) for flag, value in _flags(arguments) if flag.startswith(f"{_FLAG}.")]
    if any(flag.endswith("+") for flag, _ in dotted):  # vLLM's form of a list
        return None
    values = flag_values(arguments)
    if any(flag.startswith(f"{_FLAG}.") for flag in values):  # in a file of --config
        return None
    whole = values.get(_FLAG, {})
    try:
        if dotted:
            config: Any = {}
            for flag, value in dotted:
                content = _value(value)
                for name in reversed(flag.removeprefix(f"{_FLAG}.").split(".")):
                    content = {name: content}
                _merge(config, content)
        else:
            config = json.loads(whole) if isinstance(whole, str) else whole
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def _merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add values as vLLM does: objects and lists are joined, later values replace others."""
    for key, value in more.items():
        there = config.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            config[key] = [*there, *value]
        else:
            config[key] = value


def _value(text: str) -> Any:
    """The value of a dotted flag: JSON, or text. ValueError: vLLM has a form of its own for it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if text[:1].isdigit():  # 4k, 25.6K
            raise
        return text


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


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line to be shown: ``***`` in place of keys and tokens.

    Args:
        arguments: of a command line.
    """
    shown: list[str] = []
    secret = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if flag.startswith("--"):
            secret = flag.replace("_", "-") in _SECRETS
            shown.append(f"{flag}=***" if secret and equals else argument)
        else:
            shown.append("***" if secret else argument)
    return shown


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word as a flag, spelled with dashes, and the value that it would have."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        name, dot, path = flag.partition(".")  # what follows a dot is not vLLM's
        yield name.replace("_", "-") + dot + path, value if equals else following


def _files(arguments: Sequence[str]) -> list[Path]:
    return [Path(value) for flag, value in _flags(arguments) if flag == "--config"]


def _content(file: Path) -> dict[str, Any]:
    """What a file of ``--config`` has, by name of flag. vLLM says what is wrong with a file."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {str(key).replace("_", "-"): value for key, value in content.items()}
    return {}
