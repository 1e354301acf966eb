# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the flag and the OpenAI Python client: the README's first command."""

from pathlib import Path

import openai

from benchmarks.server import serving


def test_chat_completion_and_stream(demo_model: Path) -> None:
    arguments = ["--quantization", "smoothquant_plus", "--max-model-len", "512"]
    with serving(demo_model, *arguments) as server:
        check(server.url)


def check(server: str) -> None:
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
