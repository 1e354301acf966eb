# SPDX-License-Identifier: Apache-2.0
"""How many engines are measured at once, and what an interruption leaves."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vllm_plugin.commands.recommending.side_by_side import SideBySide, side_by_side

MODULE = "vllm_plugin.commands.recommending.side_by_side"


def test_engines_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(f"{MODULE}.total_memory", lambda: 64 << 30)
    available = psutil.virtual_memory()._replace(available=64 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    assert side_by_side(4, 1 << 20).at_once == 4
    assert side_by_side(4, 1 << 20).environment["OMP_NUM_THREADS"] == "2"
    assert side_by_side(4, 4 << 30).at_once == 3
    assert side_by_side(4, 16 << 30) == SideBySide(1, {})
    with monkeypatch.context() as patch:  # a container
        patch.setattr(f"{MODULE}.total_memory", lambda: 10 << 30)
        assert side_by_side(4, 1 << 20).at_once == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert side_by_side(4, 1 << 20).at_once == 3
    assert side_by_side(4, 1 << 20).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert side_by_side(4, 1 << 20) == SideBySide(1, {})


def test_an_interruption_ends_what_runs_and_starts_nothing_more() -> None:
    started: list[int] = []

    def wait() -> int:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
            started.append(process.pid)
            return process.wait()

    begin = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    try:
        with pytest.raises(KeyboardInterrupt), SideBySide(2, {}).pool() as pool:
            running = [pool.submit(wait) for _ in range(5)]
            while len(started) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(started) == 2 and not any(psutil.pid_exists(pid) for pid in started)
    assert [future.cancelled() for future in running] == [False] * 2 + [True] * 3
    assert time.monotonic() - begin < 60
