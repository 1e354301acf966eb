# SPDX-License-Identifier: Apache-2.0
"""Run one vLLM engine in a process of its own: JSON request on stdin, JSON answer on stdout.

``generate(...)`` is the caller's side. A process per engine keeps environment variables, plugin
registration and memory of one test out of the next.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ANSWER = "ANSWER:"
SINGLE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ROOT = Path(__file__).resolve().parents[2]
# Settings of smoothquant_plus that calibrate the demo model in seconds; its defaults take minutes
# on a processor without AVX-512. Tests that share them share the stored plan.
QUICK_WEIGHTS: dict[str, Any] = {
    "alpha": 0.5,
    "clip": False,
    "calibration": {"samples": 4, "length": 16},
}


class EngineFailed(RuntimeError):
    """The engine process ended with an error; the text is its output."""


def generate(
    model: Path | str,
    prompts: list[str],
    *,
    max_tokens: int = 24,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    **engine_args: Any,
) -> dict[str, Any]:
    """Greedy ``texts`` and ``tokens`` of ``prompts`` from ``LLM(model, **engine_args)``.

    ``prompt_nats`` has the negative log probability of each prompt token after the first.

    Raises EngineFailed when the engine does not start or dies.
    """
    request = {
        "model": str(model),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "engine_args": {
            "max_model_len": 512,
            "enforce_eager": True,
            "dtype": "bfloat16",
            "gpu_memory_utilization": 0.2,  # of memory on CPU: tests share the machine
        }
        | engine_args,
    }
    return ask_child([__file__], request, os.environ | SINGLE_PROCESS | (env or {}), timeout)


def ask_child(
    arguments: list[str], request: dict[str, Any], env: Mapping[str, str], timeout: float
) -> Any:
    """What ``python *arguments`` answers to a request on its standard input with ``answer``.

    Raises EngineFailed, with its output, when it ends without an answer.
    """
    process = subprocess.run(
        [sys.executable, *arguments],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=env,
    )
    for line in process.stdout.splitlines():
        if line.startswith(_ANSWER):
            return json.loads(line.removeprefix(_ANSWER))
    raise EngineFailed(process.stdout[-4000:] + process.stderr[-8000:])


def kernel() -> dict[str, Any]:
    """In a child: the attention that our layers are built on, by name where vLLM would not choose
    it.

    Two engines say the same only with the same kernel.
    """
    from vllm.platforms import current_platform

    blackwell = current_platform.is_cuda() and current_platform.is_device_capability_family(100)
    return {"attention_backend": "FLASH_ATTN"} if blackwell else {}


def answer(content: Any) -> None:
    """The child's side of ``ask_child``."""
    print(_ANSWER + json.dumps(content), flush=True)


def _main() -> None:
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(request["model"], **(kernel() | request["engine_args"]))
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, prompt_logprobs=0
    )
    outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
    content = {
        "texts": [o.outputs[0].text for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "prompt_nats": [
            [
                -p[t].logprob
                for t, p in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
            ]
            for o in outputs
        ],
        "quantization": str(llm.llm_engine.vllm_config.model_config.quantization),
    }
    answer(content)


if __name__ == "__main__":
    _main()
