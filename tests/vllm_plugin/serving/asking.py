# SPDX-License-Identifier: Apache-2.0
"""Requests to a server on loopback, timed, and what its metrics agent says."""

import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import openai

PORT, METRICS_PORT = 18100, 18180
PATIENCE = 240  # seconds a request may wait


@dataclass
class Request:
    """One request; times are seconds of time.monotonic()."""

    begin: float
    end: float = 0.0
    error: str = ""


def ask(text: str, stream: bool = False, **more: Any) -> str:
    """The model's answer; RuntimeError for a stream that ends early."""
    client = openai.OpenAI(  # without retries: a lost request must show
        base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | more
    options["messages"] = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model="demo", stream=stream, **options)
    if not stream:
        return answer.choices[0].message.content
    said, finish = "", None
    for chunk in answer:
        if chunk.choices:
            said += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
    if finish is None:
        raise RuntimeError(f"the stream ended after {len(said)} characters")
    return said


def timed(text: str, **more: Any) -> Request:
    request = Request(time.monotonic())
    try:
        ask(text, **more)
    except Exception as error:
        request.error = f"{type(error).__name__}: {error}"[:200]
    request.end = time.monotonic()
    return request


def scrape() -> dict[str, float]:
    """vLLM's and this plugin's names at Ray's agent, the series of each added up."""
    values: dict[str, float] = {}
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    for line in lines:
        if line.startswith("ray_vllm_"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


def scrape_until(names: tuple[str, ...], seconds: float) -> dict[str, float]:
    """As ``scrape``, once all of ``names`` are above zero: the agent lags by some ten seconds."""
    deadline = time.monotonic() + seconds
    while True:
        values = scrape()
        if all(values.get(name) for name in names) or time.monotonic() > deadline:
            return values
        time.sleep(2)
