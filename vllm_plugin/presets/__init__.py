# SPDX-License-Identifier: Apache-2.0
"""Presets of ``vllm-compress serve``: each is a file for ``vllm serve --config``, named after it.

Imports neither torch nor vLLM.
"""

from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Final, Literal, get_args

import yaml

Preset = Literal["safe", "balanced", "small"]
PRESETS: Final[tuple[Preset, ...]] = get_args(Preset)  # from the least to the most compressed


def text(preset: Preset) -> str:
    """Return the file of a preset, comments included."""
    return (files(__name__) / f"{preset}.yaml").read_text(encoding="utf-8")


def content(preset: Preset) -> dict[str, Any]:
    """Return what a preset says, by vLLM's names of flags."""
    return dict(yaml.safe_load(text(preset)))


def flags(preset: Preset) -> list[str]:
    """Return a preset as flags of ``vllm serve``, with dots where values are nested.

    A dotted flag can be overridden by a later one. JSON would replace or hide the rest.
    """
    return list(_flags("-", content(preset)))


def _flags(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, content in value.items():
            yield from _flags(f"--{key}" if name == "-" else f"{name}.{key}", content)
    else:
        yield from (name, str(value))
