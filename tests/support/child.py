# SPDX-License-Identifier: Apache-2.0
"""Functions of tests in processes of their own, such as engines.

A process per engine keeps environment variables, plugin registration and memory of one test out of
the next. ``in_child`` forks a process that has imported vLLM, because an import takes longer than
most engines do.
"""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
SINGLE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.gpu_worker"]


class EngineFailed(RuntimeError):
    """A child process ended with an error; the text is the end of its output."""


def in_child(
    function: Callable[..., Any],
    *arguments: Any,
    env: Mapping[str, str],
    timeout: float,
    fresh: bool = False,
) -> Any:
    """Return what a function returns in a child process.

    Args:
        function: A function of a module. What it returns must be picklable.
        *arguments: Its arguments.
        env: The whole environment of the child.
        timeout: The most seconds that it may take.
        fresh: Start a new interpreter, for variables that are read when vLLM is imported.

    Raises:
        EngineFailed: The function raised, took too long, or its process died.
    """
    fresh = fresh or torch.cuda.is_available()  # CUDA does not survive a fork
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = context.Process(
            target=_answer, args=(theirs, output.name, dict(env), function, arguments)
        )
        with mock.patch.dict(os.environ, env if fresh else {}, clear=fresh):
            process.start()
        theirs.close()
        try:
            if ours.poll(timeout):
                return ours.recv()
            reason = f"no answer within {timeout:g} seconds"
        except EOFError:
            process.join()
            reason = f"the process ended with status {process.exitcode}"
        finally:
            ours.close()
            process.join(20)  # its engine shuts down
            if process.is_alive():
                process.kill()
        raise EngineFailed(f"{output.read()[-12000:]}\n{reason}")


def _answer(
    connection: Connection,
    output: str,
    env: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    # What torch reads from the environment when it is imported.
    torch._dynamo.config.disable = env.get("TORCH_COMPILE_DISABLE") == "1"
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    gc.freeze()  # vLLM collects garbage a dozen times: without what is imported that takes no time
    try:
        answer = function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    connection.send(answer)


def kernel() -> dict[str, Any]:
    """In a child: the attention that our layers are built on, by name where vLLM would not choose
    it.

    Two engines say the same only with the same kernel.
    """
    from vllm.platforms import current_platform

    blackwell = current_platform.is_cuda() and current_platform.is_device_capability_family(100)
    return {"attention_backend": "FLASH_ATTN"} if blackwell else {}
