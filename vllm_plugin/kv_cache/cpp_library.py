# SPDX-License-Identifier: Apache-2.0
"""A C++ source of torch operators, compiled once per machine type and kept in the store."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.utils.cpp_extension import include_paths, library_paths
from vllm.logger import init_logger

from compress_common.errors import CompressError
from compress_common.store import Store, digest

logger = init_logger(f"vllm.{__name__}")  # vLLM only shows loggers below its own

# One source needs no build system: torch's own would want ninja on PATH, and prints its commands.
_ALWAYS: Final = ("-std=c++20", "-fPIC", "-shared")
_LIBRARIES: Final = ("-lc10", "-ltorch_cpu", "-ltorch")
_LIMIT: Final = 900  # seconds; ours takes 30


@dataclass(frozen=True)
class CppLibrary:
    """Operators that are registered with torch when the library is loaded.

    Args:
        source: The C++ file.
        flags: Compiler flags, with the instruction set that the code needs.
    """

    source: Path
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        """Key in the store: changes with all that the machine code depends on."""
        machine = [platform.machine(), *platform.libc_ver(), torch.__version__]
        machine.append(torch.backends.cpu.get_cpu_capability())
        return digest(self.source.read_bytes(), *_ALWAYS, *self.flags, "", *machine)

    def load(self, store: Store | None = None) -> None:
        """Compile the library unless the store has it intact, then load it.

        Raises:
            RuntimeError: The reason in one line, with what to install where that helps.
        """
        name = f"{self.source.stem}.so"
        try:
            folder = (store or Store()).make("kernel", self.key, lambda to: self._build(to / name))
            torch.ops.load_library(folder / name)
        except (OSError, ImportError) as error:
            raise RuntimeError(f"the kernel cannot be loaded: {_line(str(error))}") from error
        except CompressError as error:
            raise RuntimeError(_line(str(error))) from error

    def _build(self, target: Path) -> None:
        command = shlex.split(os.environ.get("CXX", "c++"))
        # A server may run without its environment's folder on PATH, where conda has a compiler.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        if (compiler := shutil.which(command[0], path=path)) is None:
            raise CompressError(
                f"the kernel cannot be compiled: no C++ compiler {command[0]!r}; install g++ (apt "
                "install g++, or dnf install gcc-c++), or name another in the variable CXX"
            )
        logger.info("compiling %s, once, to %s", self.source.name, target)
        command = [compiler, *command[1:], *_ALWAYS, *self.flags, str(self.source), "-o"]
        command += [str(target), *(f"-isystem{folder}" for folder in include_paths())]
        command += [*(f"-L{folder}" for folder in library_paths()), *_LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
        except subprocess.TimeoutExpired as error:
            raise CompressError(f"{compiler} compiled for more than {_LIMIT} seconds") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            reason = next((line for line in lines if "error:" in line), lines[-1])
            raise CompressError(f"the kernel cannot be compiled by {compiler}: {_line(reason)}")


def _line(text: str) -> str:
    return " ".join(text.split())[:400]
