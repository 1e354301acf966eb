# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the flag and the OpenAI Python client: the README's first command."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(demo_model)]
    command += ["--quantization", "smoothquant_plus", "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.2"]
    process = subprocess.Popen(
        command, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def test_chat_completion_and_stream(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=24
    )
    text = answer.choices[0].message.content
    assert "Tokyo" in text
    assert answer.usage.completion_tokens > 3
    stream = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == text
