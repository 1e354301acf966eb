# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own: memory and plugins of one are kept out of the next."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress_common.errors import CompressError, LimitError

_ENDED = "{} ended its process; SIGKILL is often the system's, for lack of memory"
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def in_process(
    module: str,
    request: dict[str, Any],
    name: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a module answers to a request. It is run with ``python -m``.

    Args:
        module: calls ``answer`` when it is run.
        request: can be written as JSON.
        name: of what is served, for the message.
        environment: what the process gets beside our own environment.

    Raises:
        CompressError: the process ended without an answer; LimitError where a signal ended it.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "answer.json"
        process = subprocess.run(
            [sys.executable, "-m", module, str(written)],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_QUIET | os.environ | dict(environment or {}) | _ENVIRONMENT,
        )
        if not written.is_file():
            if process.returncode < 0:
                told = _ENDED.format(signal.Signals(-process.returncode).name)
                raise LimitError(f"{name} was not served to its end: {told}")
            lines = [line for line in process.stdout.splitlines() if line.strip()]
            reason = next((x for x in reversed(lines) if "Error" in x), "\n".join(lines[-5:]))
            raise CompressError(f"{name} cannot be served: {reason}")
        return json.loads(written.read_text(encoding="utf-8"))


def answer(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write what a function makes of the request on standard input."""
    Path(sys.argv[1]).write_text(json.dumps(function(json.load(sys.stdin))), encoding="utf-8")
