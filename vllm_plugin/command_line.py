# SPDX-License-Identifier: Apache-2.0
"""Command lines of ``vllm serve``: mistakes that vLLM meets late, or without a word."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from vllm_plugin.settings import KEY

_FLAG = "--additional-config"


def mixed_forms(arguments: Sequence[str]) -> list[str]:
    """Refuse JSON, or the file of ``--config``, beside dotted flags: vLLM keeps only the latter.

    Args:
        arguments: of a command line; of another program than vLLM if it embeds an engine.
    """
    dotted, whole, files = [], [], []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        flag, value = flag.replace("_", "-"), value if equals else following
        if flag == _FLAG:
            whole.append(value)
        elif flag == "--config":
            files.append(Path(value))
        elif flag.startswith(f"{_FLAG}."):
            dotted.append(flag.removeprefix(f"{_FLAG}."))
    if not dotted:  # no file is read then
        return []
    given = [("as JSON", text) for text in whole]
    given += [("in the file of --config", section_in(file)) for file in files]
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


def section_in(file: Path) -> str:
    """Return what a file of ``--config`` has as ``--additional-config``; empty: nothing."""
    # vLLM itself says what is wrong with a file that cannot be read.
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        given = {str(key).replace("_", "-"): value for key, value in content.items()}
        return str(given.get(_FLAG.removeprefix("--")) or "")
    return ""
