# SPDX-License-Identifier: Apache-2.0
"""What doctor, plan and the config edge say of a model and engine arguments. Imports vLLM."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from vllm_plugin.cli import main
from vllm_plugin.commands import common
from vllm_plugin.commands.checks import model_checks

Answers = dict[str, str | None]  # by who was asked; None: accepted
BEFORE = ("doctor", "plan", "edge")  # an engine has read weights
UNAVAILABLE = "unavailable"


def answers(
    model: Path, architecture: str, engine: dict[str, Any]
) -> tuple[Answers, VllmConfig | None]:
    """Ask all three.

    Args:
        model: A folder.
        architecture: The class that vLLM has for it.
        engine: Engine arguments besides the model.

    Returns:
        The answers, and the engine config if the edge accepts. ``{UNAVAILABLE: why}`` where vLLM
        lacks a package that the model needs.
    """
    vllm_plugin.register()
    try:
        _load_in_this_process(architecture)
    except ImportError as error:
        return {UNAVAILABLE: text(error)}, None

    def args() -> EngineArgs:
        return EngineArgs(model=str(model), **engine)

    said: Answers = {"doctor": None, "plan": _plan(model, engine), "edge": None}
    with contextlib.redirect_stdout(io.StringIO()):
        wrong = [check for check in model_checks(args()) if check.status == "problem"]
        said["doctor"] = "; ".join(check.found for check in wrong) or None
        try:
            return said, args().create_engine_config()
        except Exception as error:
            said["edge"] = text(error)
            return said, None


def text(error: Exception) -> str:
    """One string of an error and its type."""
    return f"{type(error).__name__}: {error}"


def _plan(model: Path, engine: dict[str, Any]) -> str | None:
    """What `vllm-compress plan` prints when it refuses."""
    words = ["vllm-compress", "plan", str(model), "--gpu-memory", "1GiB", "--context", "512"]
    words += ["--activation-memory", "0B", "--block-size", "32"]
    if method := engine.get("quantization"):
        words += ["--quantization", method]
    words += ["--additional-config", json.dumps(engine.get("additional_config", {}))]
    printed, before = io.StringIO(), common.err.file
    common.err.file = printed
    try:
        with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stopped:
        return printed.getvalue() if stopped.code else None
    except Exception as error:
        return text(error)
    finally:
        common.err.file = before
    return None


def _load_in_this_process(architecture: str) -> None:
    """Have vLLM know a model by its class; by its name, it would start a process to look at it."""
    known = ModelRegistry.models[architecture]
    ModelRegistry.register_model(architecture, known.load_model_cls())
