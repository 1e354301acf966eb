# SPDX-License-Identifier: Apache-2.0
"""How a refusal leaves the ``vllm`` command: its message alone, without a traceback above it.

Standard library only, because it also reports that the rest of the plugin cannot be imported.
"""

import multiprocessing
import sys
import threading
from pathlib import Path


def end_command(error: Exception) -> None:
    """Exit with the message of ``error`` if this process is the ``vllm`` command.

    Everywhere else it returns, and the caller raises: a program that calls ``LLM``, Ray Serve or a
    test must get the exception. ``SystemExit`` passes through vLLM's event loop, so that no frame
    of the API server is printed.

    Args:
        error: what was refused, in words for users.

    Raises:
        SystemExit: in the main thread of the ``vllm`` command; the exit code is 1.
    """
    if is_vllm_command() and threading.current_thread() is threading.main_thread():
        raise SystemExit(f"error: {error}") from error


def is_vllm_command() -> bool:
    """Whether the main program of this process is vLLM's own command line."""
    if multiprocessing.parent_process() is not None:
        return False
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m
        return spec.name.startswith("vllm.entrypoints.")
    return Path(sys.argv[0]).stem == "vllm"
