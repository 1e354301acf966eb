# SPDX-License-Identifier: Apache-2.0
"""A first conversation with a server of the demo model."""

import openai


def check_chat(url: str) -> None:
    """It knows the capital of Japan, and streams what it says."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
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
