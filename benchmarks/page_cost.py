# SPDX-License-Identifier: Apache-2.0
"""What the page `/compress` costs: a server while a browser has the page open, and while none has.

    .venv/bin/python -m benchmarks.page_cost [--json] [--out FILE]

One server: the demo model, float32, snap_kv at keep 0.25. Its engine computes on one core less than
the machine has, as vLLM advises, so the front end has one. In each round the same requests are sent
twice. In one of the two passes a client does what an open page does: it fetches `/compress` once,
and then `/metrics` as often as the page.

  page_throughput_ratio   generated tokens per second of wall time, with the page open over closed
  page_cpu_share          CPU time of the server for a reading, over the time between two: the share
                          of one core that an open page takes, of a server that does nothing else
  page_read_ms            time until `/metrics` was answered under load, median

Limits: one machine runs server and client. CPU time under load tells nothing: the engine's threads
spin while they wait for each other, so a core that is taken from one shows as time of all.
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
from typing import Any

import openai
import psutil

from benchmarks.common import Options, Part, Result, alternate, cache_folder, main
from benchmarks.kv_engine import bench_model
from benchmarks.server import Server, serving
from vllm_plugin.metrics.page import ROUTE

EVERY = 5.0  # seconds between two readings of the page
AT_ONCE = 8
READINGS = 100  # for the share of a core
POOL_BYTES = 256 << 20
PLUGINS = "compress,compress_page"
KV = "--additional-config.compress.kv"
PROMPT = "The river was low, and the stones that lay in it could be counted from the bridge. " * 12


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


def fetch(server: Server, path: str) -> None:
    """Read a page of the server."""
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as answer:
        answer.read()


def reading_seconds(server: Server, readings: int) -> float:
    """CPU time of one reading of the metrics, without what an idle server takes meanwhile."""
    started, before = time.perf_counter(), cpu_seconds(server.pid)
    for _ in range(readings):
        fetch(server, "/metrics")
    middle, taken = cpu_seconds(server.pid), time.perf_counter() - started
    time.sleep(taken)
    idle = cpu_seconds(server.pid) - middle
    return (middle - before - idle) / readings


@contextmanager
def polled(server: Server, taken: list[float]) -> Iterator[None]:
    """An open page, as long as the context lasts. ``taken`` gets the seconds of each reading."""
    closed = threading.Event()

    def watch() -> None:
        fetch(server, ROUTE)
        while True:
            started = time.perf_counter()
            fetch(server, "/metrics")
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
    requests, tokens = (4, 4) if options.smoke else (AT_ONCE, 128)
    flags = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(POOL_BYTES)]
    flags += ["--dtype", "float32", "--no-enable-prefix-caching"]
    flags += [f"{KV}.policy", "snap_kv", f"{KV}.keep", "0.25"]
    threads = str(max(1, len(os.sched_getaffinity(0)) - 1))
    env = {"VLLM_PLUGINS": PLUGINS, "OMP_NUM_THREADS": threads}
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    taken: list[float] = []
    log = cache_folder() / "page.log"
    with serving(model, *flags, env=env, output=log) as server:

        def measure(name: str) -> float:
            with polled(server, taken) if name == "open" else nullcontext():
                started = time.perf_counter()
                return send(server, requests, tokens) / (time.perf_counter() - started)

        samples = alternate(("open", "closed"), options.rounds, measure, "page")
        seconds = reading_seconds(server, 4 if options.smoke else READINGS)
    result.ratio("page_throughput_ratio", samples["open"], samples["closed"])
    result.put("page_cpu_share", seconds / EVERY, cpu_ms=1000 * seconds, every_s=EVERY)
    result.put("page_read_ms", 1000 * statistics.median(taken), readings=len(taken))


KEYS = ("page_throughput_ratio", "page_cpu_share", "page_read_ms")
PARTS = {"page": Part(KEYS, run)}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
