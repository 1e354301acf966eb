# SPDX-License-Identifier: Apache-2.0
"""Engines that are measured at once: on a CPU several, each with a share of the cores."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch

from compress_common.calibration.precision import total_memory

_PROGRAM = 3 << 30  # bytes of a process without weights, a small cache included
_LOADED = 4  # times the weights of 16 bits: in float32, and once more while an engine loads


@dataclass(frozen=True)
class SideBySide:
    """How many processes compute at once, and what their environment adds.

    A small model leaves most of a second thread idle, so two engines of one thread each take less
    time than one engine of two threads after the other.

    Attributes:
        at_once: processes.
        environment: what each gets beside ours. It goes before ours, whose threads all share.
    """

    at_once: int
    environment: dict[str, str]

    @contextmanager
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        """Yield a pool of threads that wait for processes.

        After an error or an interruption nothing more starts, and what runs is ended.
        """
        pool, others = ThreadPoolExecutor(self.at_once), set(_children())
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(_children()) - others:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            raise
        finally:
            pool.shutdown()


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def side_by_side(jobs: int, weights: int) -> SideBySide:
    """Return how many of some engines are measured at once on this machine.

    Args:
        jobs: engines in all.
        weights: bytes of the checkpoint.
    """
    if torch.cuda.is_available():
        return SideBySide(1, {})
    threads = _threads()
    each = _PROGRAM + _LOADED * weights
    free = min(psutil.virtual_memory().available, total_memory())  # a container has less
    at_once = max(1, min(jobs, threads, free // each))
    if at_once == 1:
        return SideBySide(1, {})
    # vLLM would bind the threads of every engine to the same cores.
    share = {"OMP_NUM_THREADS": str(threads // at_once), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return SideBySide(at_once, share)


def _threads() -> int:
    """Return how many threads may compute: the cores, or fewer if the environment says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores
