# SPDX-License-Identifier: Apache-2.0
"""What the page `/compress` costs: a server while a browser has the page open, and while none has.

    .venv/bin/python -m benchmarks.page_cost [--json] [--out FILE]

One server: the demo model, float32, snap_kv at keep 0.25. In each round the same requests are sent
twice. In one of the two passes a client does what an open page does: it fetches `/compress` once,
and then `/metrics` as often as the page.

  page_throughput_ratio   generated tokens per second of wall time, with the page open over closed
  page_cpu_ratio          CPU seconds of all processes of the server, with the page open over closed
  page_read_ms            time until `/metrics` was answered, median

Limits: one machine runs servers and client, so wall time is noisy. CPU time is the steadier ratio.
"""

import os
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import openai
import psutil

from benchmarks.common import Options, Part, Result, alternate, cache_folder, main
from benchmarks.kv_engine import bench_model
from benchmarks.server import Server, serving
from vllm_plugin.metrics.page import ROUTE

EVERY = 5.0  # seconds between two readings of the page
AT_ONCE = 8
POOL_BYTES = 256 << 20
PLUGINS = "compress,compress_page"
KV = "--additional-config.compress.kv"
PROMPT = "The river was low, and the stones that lay in it could be counted from the bridge. " * 12


@dataclass(frozen=True)
class Sample:
    """One pass of a round."""

    tokens_per_second: float
    cpu_seconds: float


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all below it. No process of a server ends while it serves."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def send(server: Server, requests: int, tokens: int) -> int:
    """Send requests, ``AT_ONCE`` at a time; how many tokens they generated."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)

    def ask(number: int) -> int:
        extra: dict[str, Any] = {"ignore_eos": True}
        answer = client.completions.create(
            model="demo",
            prompt=f"{number}. {PROMPT}",
            max_tokens=tokens,
            temperature=0,
            extra_body=extra,
        )
        return int(answer.usage.completion_tokens)

    with client, ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(ask, range(requests)))


@contextmanager
def polled(server: Server, taken: list[float]) -> Iterator[None]:
    """An open page, as long as the context lasts. ``taken`` gets the seconds of each reading."""
    closed = threading.Event()

    def fetch(path: str) -> None:
        with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as answer:
            answer.read()

    def watch() -> None:
        fetch(ROUTE)
        while True:
            started = time.perf_counter()
            fetch("/metrics")
            taken.append(time.perf_counter() - started)
            if closed.wait(EVERY):
                return

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            closed.set()
            watching.result()


def run(options: Options, result: Result) -> None:
    """One server, asked with the page open and closed in turns."""
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule --kv-cache-memory-bytes
    model = bench_model(options)
    requests, tokens = (4, 4) if options.smoke else (12, 96)
    flags = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(POOL_BYTES)]
    flags += ["--dtype", "float32", "--no-enable-prefix-caching"]
    flags += [f"{KV}.policy", "snap_kv", f"{KV}.keep", "0.25"]
    taken: list[float] = []
    log = cache_folder() / "page.log"
    with serving(model, *flags, env={"VLLM_PLUGINS": PLUGINS}, output=log) as server:

        def measure(name: str) -> Sample:
            with polled(server, taken) if name == "open" else nullcontext():
                before, started = cpu_seconds(server.pid), time.perf_counter()
                generated = send(server, requests, tokens)
                seconds = time.perf_counter() - started
                return Sample(generated / seconds, cpu_seconds(server.pid) - before)

        samples = alternate(("open", "closed"), options.rounds, measure, "page")
    ours, base = samples["open"], samples["closed"]
    for key, field in (
        ("page_throughput_ratio", "tokens_per_second"),
        ("page_cpu_ratio", "cpu_seconds"),
    ):
        result.ratio(key, [getattr(s, field) for s in ours], [getattr(s, field) for s in base])
    result.put("page_read_ms", 1000 * statistics.median(taken), readings=len(taken))


KEYS = ("page_throughput_ratio", "page_cpu_ratio", "page_read_ms")
PARTS = {"page": Part(KEYS, run)}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
