# SPDX-License-Identifier: Apache-2.0
"""Bad requests over HTTP: a clear 4xx each, counted where it is ours, and the server stays up."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.server import Server, serving

KEY = "secret-of-this-test"
REFUSED = "vllm_compress_refused_requests_total"
STREAM_CHECK = "vllm_plugin.stream_check.StreamCheck"
# Route, and what a request must have there besides model and vllm_xargs.
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "completions": {"prompt": "Hello", "max_tokens": 4},
    "responses": {"input": "Hello", "max_output_tokens": 4},
    "messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
}


@pytest.fixture(scope="module")
def server(demo_model: Path):
    kv = {"policy": "snap_kv", "keep": 0.25}
    arguments = ["--additional-config", json.dumps({"compress": {"kv": kv}})]
    arguments += ["--max-model-len", "512", "--api-key", KEY, "--middleware", STREAM_CHECK]
    with serving(demo_model, *arguments) as server:
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


def post(server: Server, route: str, key: str = KEY, **more: object) -> tuple[int, str]:
    """Status and whole body, of a stream its events."""
    body = {"model": "demo", **ROUTES[route], **more}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}/v1/{route}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_bad_request_is_refused_before_its_answer_starts(
    server: Server, route: str, stream: bool
) -> None:
    before = server.value(REFUSED)
    status, text = post(server, route, stream=stream, vllm_xargs={"compress_keep": 0.5})
    assert (status, "can only be 1" in text) == (400, True), text
    status, text = post(server, route, stream=stream, vllm_xargs={"compres_keep": 1})
    assert (status, "did you mean 'compress_keep'?" in text) == (400, True), text
    assert server.value(REFUSED) - before == 2
    assert server.value(REFUSED, reason="unknown_key") > 0
    status, text = post(
        server, route, stream=stream, vllm_xargs={"compress_keep": 1, "session_id": "a"}
    )
    assert status == 200 and "error" not in text.replace('"error":null', ""), text
    assert server.value(REFUSED) - before == 2


def test_a_stream_without_the_key_is_not_looked_at(server: Server) -> None:
    before = server.value(REFUSED)
    bad = {"stream": True, "vllm_xargs": {"compress_keep": 0.5}}
    assert post(server, "completions", key="another", **bad)[0] == 401
    assert server.value(REFUSED) == before


def test_what_is_no_valid_stream_gets_vllms_own_answer(server: Server) -> None:
    status, text = post(server, "completions", stream=True, temperature="hot")
    assert status == 400 and "temperature" in text


def test_our_connector_counts_as_an_external_cache_that_never_hits(server: Server) -> None:
    """What docs/metrics.md says of vLLM's own series. Mend the page if vLLM changes it."""
    series = "vllm:external_prefix_cache_{}_total"
    before = server.value(series.format("queries"))
    cached = server.value("vllm:prefix_cache_hits_total")
    prompt = server.value("vllm:prompt_tokens_total")
    assert ask(server, "Count to ten. " * 10)
    asked = server.value("vllm:prompt_tokens_total") - prompt
    asked -= server.value("vllm:prefix_cache_hits_total") - cached
    assert server.value(series.format("queries")) - before == asked > 0
    assert server.value(series.format("hits")) == 0


def test_unknown_model_and_route(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="Hello")
    assert ask(server)
