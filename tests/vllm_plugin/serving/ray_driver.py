# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress ray-serve` used, measured and hurt.

``python -m tests.vllm_plugin.serving.ray_driver OUT MODEL [OPTION...]`` in a network namespace of
its own (see loopback.py): OUT becomes a JSON object with answers, metrics and what a killed engine
cost; options go to the command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tests.vllm_plugin.serving import loopback
from tests.vllm_plugin.serving.asking import METRICS_PORT, PORT, ask, scrape_until, timed

QUESTION = "What is the capital of Japan?"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
METRICS = (
    "ray_vllm_generation_tokens_total",
    "ray_vllm_compress_info",
    "ray_vllm_compress_kv_evicted_tokens_total",
    "ray_vllm_compress_kv_freed_blocks_total",
)
START, RETURN = 300, 240  # seconds allowed until the first answer, and from the kill to the next
FORGETS = 30  # seconds after which Ray exports no gauge that was not set again
BACK = 5  # answers after which the engine counts as back
BETWEEN = 0.5  # seconds between the requests that follow


def main() -> None:
    out, model, *more = sys.argv[1:]
    loopback.up()
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie in it
    command = [sys.executable, "-m", "vllm_plugin.cli", "ray-serve", model, "--model-id", "demo"]
    command += ["--port", str(PORT), "--metrics-port", str(METRICS_PORT), *more]
    # With a token of its own, Ray leaves none in the user's home.
    ray = {"RAY_TMPDIR": scratch, "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    server = subprocess.Popen(command, env=os.environ | ray)
    started = psutil.Process(server.pid)
    try:
        result = used(server)
        server.send_signal(signal.SIGINT)
        result["exit_code"] = server.wait(90)
        Path(out).write_text(json.dumps(result, indent=2))
    finally:
        left = started.children(recursive=True) if server.poll() is None else []
        for process in [*left, *([started] if left else [])]:
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def used(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    begin = time.monotonic()
    wait_until_ready(server)
    result: dict[str, Any] = {"seconds_until_ready": time.monotonic() - begin}
    result["answer"] = ask(QUESTION)
    result["streamed"] = ask(QUESTION, stream=True)
    result["long"] = ask(FILLER * 30 + QUESTION)
    result["metrics"] = scrape_until(METRICS, 60)
    time.sleep(FORGETS)
    result["metrics_when_idle"] = scrape_until(METRICS, 0)
    result["load_average"] = os.getloadavg()[0]
    result["kill"] = kill_engine(server)
    result["answer_after"] = ask(QUESTION)
    return result


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while timed(QUESTION, max_tokens=1).error:
        assert server.poll() is None, "ray-serve ended"
        assert time.monotonic() < deadline, "no answer"
        time.sleep(1)


def kill_engine(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """SIGKILL the busiest engine core during two streams; other requests follow."""
    cores = [p for p in psutil.Process(server.pid).children(recursive=True) if is_core(p)]
    with ThreadPoolExecutor(2 + int(RETURN / BETWEEN)) as pool:
        endless: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
        streams = [
            pool.submit(timed, f"{FILLER * 20}Tell story {n}.", stream=True, **endless)
            for n in range(2)
        ]
        before = [core.cpu_times().user for core in cores]
        time.sleep(4)
        busy = [core.cpu_times().user - old for core, old in zip(cores, before, strict=True)]
        assert not any(stream.done() for stream in streams), "the streams ended before the kill"
        cores[busy.index(max(busy))].kill()  # one that has streams
        killed = time.monotonic()
        others = []
        while time.monotonic() < killed + RETURN:
            others.append(pool.submit(timed, QUESTION, max_tokens=8))
            time.sleep(BETWEEN)
            if sum(not other.result().error for other in others if other.done()) >= BACK:
                break
        in_flight = [stream.result() for stream in streams]
        followed = [other.result() for other in others]
    answered = [request for request in followed if not request.error]
    assert answered, f"no answer in {RETURN} s: {followed[-1].error}"
    lost = [
        asdict(request) | {"begin": request.begin - killed, "end": request.end - killed}
        for request in followed
        if request.error
    ]
    return {
        "engines": len(cores),
        "in_flight": len(in_flight),
        "in_flight_errors": [request.error for request in in_flight if request.error],
        "in_flight_told_after_seconds": max(request.end for request in in_flight) - killed,
        "followed": len(followed),
        "followed_lost": len(lost),
        "lost": lost,
        "seconds_until_answer": min(request.end for request in answered) - killed,
        "longest_wait_seconds": max(request.end - request.begin for request in answered),
    }


def is_core(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


if __name__ == "__main__":
    main()
