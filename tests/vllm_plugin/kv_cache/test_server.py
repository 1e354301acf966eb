# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with a KV policy and int4 weights, the OpenAI Python client, several processes."""

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from benchmarks.server import serving
from tests.support.chat import check_chat
from tests.support.generate import QUICK_WEIGHTS

COMMAND = (sys.executable, "-m", "vllm_plugin.cli")
NOTE = "The secret number is 48213. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. "


@pytest.mark.parametrize("policy", ["prefix_kv", pytest.param("cskv", marks=pytest.mark.slow)])
def test_chat_requests(demo_model: Path, profile: Path, bases: Path, policy: str) -> None:
    kv = {"policy": policy}
    kv |= {"bases": str(bases)} if policy == "cskv" else {"keep": 0.25, "profile": str(profile)}
    section = {"kv": kv, "weights": QUICK_WEIGHTS}
    arguments = ["--additional-config", json.dumps({"compress": section})]
    arguments += ["--quantization", "smoothquant_plus", "--max-model-len", "1024"]
    with serving(demo_model, *arguments) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(text: str, **more: object) -> openai.types.chat.ChatCompletion:
            messages = [{"role": "user", "content": text}]
            return client.chat.completions.create(
                model="demo", messages=messages, temperature=0, max_tokens=24, extra_body=more
            )

        check_chat(server.url)
        long = ask(FILLER * 30 + "What is the capital of Japan?")
        assert long.usage.prompt_tokens > 400 and long.usage.completion_tokens > 3
        # What it says depends on the kernels of the machine: recall is a benchmark's affair.
        assert policy == "cskv" or len(long.choices[0].message.content.split()) > 3
        assert server.value("vllm_compress_kv_evicted_tokens_total") > 200
        # A second turn hits what the first one left in the prefix cache, and says the same.
        again = ask(FILLER * 30 + "What is the capital of Japan?")
        assert again.choices[0].message.content == long.choices[0].message.content

        whole = ask(FILLER * 30 + NOTE, vllm_xargs={"compress_keep": 1})
        assert whole.usage.completion_tokens > 0
        told = json.loads(subprocess.check_output([*COMMAND, "status", server.url, "--json"]))[0]
        assert told["info"]["policy"] == policy and not told["warnings"]
        assert told["metrics"]["kv_skipped_requests"]["opted_out"] == 1
        with pytest.raises(openai.BadRequestError, match="compress_keep of a request can only be"):
            ask("Hello", vllm_xargs={"compress_keep": 0.5})
