# SPDX-License-Identifier: Apache-2.0
"""A diffusion model behind the OpenAI endpoint, asked with the OpenAI client."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from benchmarks import tiny_llada
from benchmarks.server import Server, serving
from tests.support.diffusion_engine import expected

SECTION = {"policy": "elastic", "gamma": 0.95}
REFUSED = "vllm_compress_refused_requests_total"
DIGITS = "3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3 8 4 6 2 6 4 3 3 8 3 2 7 9 5"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--additional-config", json.dumps({"compress": {"diffusion": SECTION}})]
    arguments += ["--dtype", "float32", "--max-model-len", "128"]
    folder = tmp_path_factory.mktemp("llada")
    shutil.copytree(tiny_llada.folder(), folder, dirs_exist_ok=True)
    file = folder / "generation_config.json"
    defaults = {"repetition_penalty": 1.2, "top_p": 0.9, "top_k": 20}  # that no client sends
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    with serving(folder, *arguments) as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(server: Server, prompt: str, **more: Any) -> Any:
    more = {"max_tokens": 40} | more
    return client(server).completions.create(model="demo", prompt=prompt, **more)


def test_completions_are_the_reference_and_counted(server: Server) -> None:
    answer = complete(server, f"copy {DIGITS} =")
    model = tiny_llada.load(tiny_llada.folder())
    prompt = [tiny_llada.BOS, tiny_llada.TASKS["copy"], *map(int, DIGITS.split())]
    request = {"prompt": [*prompt, tiny_llada.EQUALS], "max_tokens": 40}
    tokens, plans = expected(model, SECTION, request, mask=tiny_llada.MASK, stops={tiny_llada.EOS})
    assert tokens[-1] == tiny_llada.EOS
    assert answer.choices[0].text.split() == [str(token) for token in tokens[:-1]]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(request["prompt"])
    assert answer.usage.completion_tokens == len(tokens)
    assert server.value("vllm_compress_diffusion_steps_total") == len(plans)
    assert server.value("vllm_compress_diffusion_tokens_total") == len(tokens)


def test_chat_streams_the_same_text(server: Server) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"copy {DIGITS}"}],
        "max_tokens": 40,
        # Short blocks, so that tokens become final a few at a time.
        "extra_body": {"vllm_xargs": {"compress_tokens_per_step": 2, "compress_block_length": 4}},
    }
    chat = client(server).chat.completions
    whole = chat.create(**asked)
    text = whole.choices[0].message.content
    assert text.split()[:8] == DIGITS.split()[:8]
    chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(piece or "" for piece in pieces) == text
    assert sum(bool(piece) for piece in pieces) > 4  # not all at the end
    assert chunks[-1].usage == whole.usage


def test_several_at_once_are_those_alone(server: Server) -> None:
    prompts = [f"{task} {DIGITS[: 2 * n - 1]} =" for task in tiny_llada.TASKS for n in (32, 20, 9)]
    alone = [complete(server, prompt).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        at_once = pool.map(lambda prompt: complete(server, prompt).choices[0].text, prompts)
        assert list(at_once) == alone


def test_lengths_and_stops(server: Server) -> None:
    prompt = f"copy {DIGITS} ="
    short = complete(server, prompt, max_tokens=5)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 5
    whole = complete(server, prompt).choices[0].text
    stopped = complete(server, prompt, stop=" 9")
    assert stopped.choices[0].text == whole[: whole.index(" 9")]
    assert stopped.choices[0].finish_reason == "stop"
    longest = complete(server, prompt, max_tokens=128 - 35, extra_body={"ignore_eos": True})
    assert longest.choices[0].finish_reason == "length"
    assert longest.usage.total_tokens == 128


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"logprobs": 1}, "logprobs 1 is not supported"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"extra_body": {"vllm_xargs": {"compress_gamma": 2}}}, "less than or equal to 1"),
        ({"extra_body": {"vllm_xargs": {"compress_period": 2}}}, "compress_gamma"),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "structured_outputs"),
    ],
)
def test_refused(server: Server, asked: dict[str, Any], told: str) -> None:
    before = server.value(REFUSED, reason="diffusion")
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, "copy 1 2 3 =", **asked)
    assert told in str(caught.value)
    assert server.value(REFUSED, reason="diffusion") == before + 1
    assert complete(server, f"copy {DIGITS} =").choices[0].text


def test_beam_search_is_refused(server: Server) -> None:
    with pytest.raises(openai.APIStatusError):
        complete(server, "copy 1 2 3 =", extra_body={"use_beam_search": True, "n": 2})
    assert complete(server, f"copy {DIGITS} =").choices[0].text


def test_requests_set_their_own(server: Server) -> None:
    before = server.value("vllm_compress_diffusion_request_steps_total")
    xargs = {"vllm_xargs": {"compress_tokens_per_step": 1, "compress_block_length": 8}}
    answer = complete(server, f"copy {DIGITS} =", max_tokens=16, extra_body=xargs)
    after = server.value("vllm_compress_diffusion_request_steps_total")
    assert after - before == answer.usage.completion_tokens == 16
