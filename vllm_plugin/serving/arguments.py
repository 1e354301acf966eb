# SPDX-License-Identifier: Apache-2.0
"""Checks the settings and engine arguments of a replica, before Ray starts it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from compress_common.calibration.text import SELF
from compress_common.errors import CompressError, joined, nearest
from quant_methods.registry import methods
from vllm_plugin.settings import KEY, parse_settings


def checked_section(
    section: dict[str, Any],
    others: dict[str, Any],
    quantization: str | None,
    tensor_parallel: int,
) -> dict[str, Any]:
    """Return the ``compress`` section with absolute paths: replicas run in folders of their own.

    Args:
        section: as given.
        others: the other sections of ``additional_config``. One may be ours under a wrong name.
        quantization: as given, or None.
        tensor_parallel: ranks of an engine.

    Raises:
        CompressError: lists what is wrong with the settings.
    """
    settings = parse_settings(others | {KEY: section})
    if settings.kv is not None:
        settings.kv.build()
        files = {"profile": settings.kv.profile, "bases": settings.kv.bases}
        absolute = {
            name: str(Path(file).expanduser().resolve()) for name, file in files.items() if file
        }
        section = section | {"kv": dict(section["kv"]) | absolute}
    if quantization in methods() and settings.weights is not None:
        settings.weights.request(quantization, tensor_parallel)
    elif quantization is not None and settings.weights is not None:
        raise CompressError(
            f"{KEY}.weights is for quantization {' or '.join(methods())}, not {quantization!r}"
        )
    if settings.weights is not None and settings.weights.calibration.source != SELF:
        weights = dict(section["weights"])
        source = Path(settings.weights.calibration.source).expanduser().resolve()
        weights["calibration"] = dict(weights["calibration"]) | {"source": str(source)}
        section = section | {"weights": weights}
    return section


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments and quantization methods that vLLM does not have.

    Ray itself refuses the former without a hint, and the latter minutes later, in a replica.

    Raises:
        CompressError: names each of them and the nearest valid name.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    known = {field.name for kind in (AsyncEngineArgs, FrontendArgs) for field in fields(kind)}
    problems = [
        f"engine_kwargs: vLLM has no engine argument {key!r}{nearest(key, known)}"
        for key in arguments.keys() - known
    ]
    quantization = arguments.get("quantization")
    valid = [*methods(), *QUANTIZATION_METHODS]
    if quantization is not None and quantization not in valid:
        problems.append(
            f"quantization {quantization!r} is unknown{nearest(quantization, valid)} "
            f"(methods of this plugin: {', '.join(methods())})"
        )
    if problems:
        raise joined(problems)
