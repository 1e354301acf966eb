# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in processes of its own, for benchmarks and tests that speak HTTP."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_PATIENCE = 900  # seconds: a start that calibrates takes minutes on a processor without AVX-512


@dataclass(frozen=True)
class Server:
    """A server that answers: its address, and the id of its first process."""

    url: str
    pid: int

    def scrape(self) -> list[Sample]:
        """What ``/metrics`` has now."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return [s for family in text_string_to_metric_families(text) for s in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        found = [
            s.value for s in self.scrape() if s.name == name and labels.items() <= s.labels.items()
        ]
        if not found:
            raise KeyError(f"{name} {labels} is not on {self.url}/metrics")
        return sum(found)


@contextmanager
def serving(
    model: Path, *arguments: str, env: dict[str, str] | None = None, output: Path | None = None
) -> Iterator[Server]:
    """A server of ``model`` under the name "demo", as long as the context lasts.

    output: file for what it prints; None prints here. RuntimeError when it ends, or is not ready
    after ``_PATIENCE``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), *arguments]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.2"]
    stream = output.open("wb") if output else None
    process = subprocess.Popen(
        command,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | (env or {}),
        start_new_session=True,
        stdout=stream,
        stderr=subprocess.STDOUT if stream else None,
    )
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    try:
        _wait(process, server.url)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
        if stream:
            stream.close()


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise RuntimeError(f"the server was not ready after {_PATIENCE} s")
