# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in processes of their own, for benchmarks that let several take turns.

``Engine(...)`` starts one; ``engine.ask("decode", ...)`` calls a method of
``engine_child.Child`` there, or of the class that a subclass of ``Engine`` names. An idle engine
waits in a pipe and uses no processor time. A process per engine keeps environment variables,
plugins and memory of one out of the next.

A cold start (a new interpreter) is what users get. ``preloaded`` forks a process that has imported
vLLM once: for --smoke, where imports would be most of the time.
"""

import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# An engine that talks to nobody and lives in one process.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Whether glibc gives the memory of activations back after each layer, to fault it in again, depends
# on what else lies on the heap: some percent between engines that do the same. tcmalloc, which vLLM
# advises, keeps it. 32 MiB is the most that glibc takes; it looks when a process starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
ENGINE_ARGS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 1024,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 1 << 29,
}
_PATIENCE = 1800.0  # seconds for one answer


class EngineFailed(RuntimeError):
    """The engine's process ended or did not answer; the text is the end of its log."""


class Engine:
    """``LLM(model, **ENGINE_ARGS, **engine_args)`` in a child process, a context manager.

    ``plugin=False`` is stock vLLM: no plugin is loaded at all. ``started`` is what
    ``engine_child.Child.started`` returned, plus ``wall_s`` from the start of the process until the
    engine was ready for requests.
    """

    child = "benchmarks.engine_child:Child"

    def __init__(
        self,
        model: Path,
        *,
        plugin: bool = True,
        env: dict[str, str] | None = None,
        preloaded: bool = False,
        **engine_args: Any,
    ) -> None:
        os.environ |= MALLOC
        context = _context(preloaded)
        self._log = tempfile.NamedTemporaryFile("r", prefix="engine-", suffix=".log")  # noqa: SIM115
        self._connection, theirs = context.Pipe()
        environment = ENVIRONMENT | {"VLLM_PLUGINS": "compress" if plugin else ""} | (env or {})
        arguments = ENGINE_ARGS | {"model": str(model)} | engine_args
        begin = time.perf_counter()
        self._process = context.Process(
            target=_serve, args=(theirs, self._log.name, environment, self.child, arguments)
        )
        self._process.start()
        theirs.close()
        try:
            self.started: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise
        self.started["wall_s"] = time.perf_counter() - begin

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call ``Child.<method>(**arguments)`` and wait for its result."""
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            if self._connection.poll(_PATIENCE):
                return self._connection.recv()
        except EOFError:
            pass
        raise EngineFailed(self.log()[-4000:])

    def log(self) -> str:
        """What the engine has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        """End the engine's process. A second call does nothing."""
        self._connection.close()  # the child's loop ends
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_process(function: Callable[..., T], *arguments: Any, preloaded: bool = False) -> T:
    """Run a function of a module in a child process: its memory and imports go when it ends."""
    with ProcessPoolExecutor(1, mp_context=_context(preloaded)) as pool:
        return pool.submit(_quiet, function, *arguments).result()


def _context(preloaded: bool) -> Any:
    context = multiprocessing.get_context("forkserver" if preloaded else "spawn")
    if preloaded:
        context.set_forkserver_preload(["benchmarks.engine_child"])
    return context


def _quiet(function: Callable[..., T], *arguments: Any) -> T:
    os.dup2(2, 1)  # the closing JSON line has standard output to itself
    return function(*arguments)


def _serve(
    connection: Connection,
    log: str,
    environment: dict[str, str],
    child_class: str,
    arguments: dict[str, Any],
) -> None:
    """The child: answer requests until the parent closes the pipe. An error ends it."""
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)  # before vLLM is imported
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    module, _, name = child_class.partition(":")
    child = getattr(importlib.import_module(module), name)(arguments)
    connection.send(child.started())
    while True:
        try:
            method, options = connection.recv()
        except EOFError:
            break
        connection.send(getattr(child, method)(**options))
