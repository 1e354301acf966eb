# SPDX-License-Identifier: Apache-2.0
"""Bad requests over HTTP: a clear 4xx each, counted where it is ours, and the server stays up."""

import json
from pathlib import Path

import openai
import pytest

from benchmarks.server import Server, serving

KEY = "secret-of-this-test"
REFUSED = "vllm_compress_refused_requests_total"


@pytest.fixture(scope="module")
def server(demo_model: Path):
    kv = {"policy": "snap_kv", "keep": 0.25}
    arguments = ["--additional-config", json.dumps({"compress": {"kv": kv}})]
    with serving(demo_model, *arguments, "--max-model-len", "512", "--api-key", KEY) as server:
        yield server


def ask(server: Server, text: str = "Hello", key: str = KEY, **more: object) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": text}],
        max_tokens=8,
        extra_body=more,
    )
    return answer.choices[0].message.content


def test_wrong_key(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(server, key="another")
    assert ask(server)


def test_prompt_that_does_not_fit(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        ask(server, "word " * 1000)
    assert ask(server)


@pytest.mark.parametrize("value", [0.5, "all", -1, [1], {}])
def test_malformed_compress_keep(server: Server, value: object) -> None:
    before = server.value(REFUSED, reason="compress_keep")
    with pytest.raises(openai.BadRequestError):
        ask(server, vllm_xargs={"compress_keep": value})
    assert ask(server)
    # What is not even a valid type of vllm_xargs is refused by vLLM and not counted by us.
    ours = not isinstance(value, dict)
    assert server.value(REFUSED, reason="compress_keep") - before == ours


def test_unknown_model_and_route(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="Hello")
    assert ask(server)
