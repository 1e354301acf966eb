# SPDX-License-Identifier: Apache-2.0
"""Run one vLLM engine in a process of its own."""

import os
from pathlib import Path
from typing import Any

from tests.support.child import SINGLE_PROCESS, in_child, kernel

# Settings of smoothquant_plus that calibrate the demo model in seconds; its defaults take minutes
# on a processor without AVX-512. Tests that share them share the stored plan.
QUICK_WEIGHTS: dict[str, Any] = {
    "alpha": 0.5,
    "rounding": "nearest",
    "clip": False,
    "calibration": {"samples": 4, "length": 16},
}


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
    environment = os.environ | SINGLE_PROCESS | (env or {})
    return in_child(_generate, request, env=environment, timeout=timeout)


def _generate(request: dict[str, Any]) -> dict[str, Any]:
    """In a child."""
    from vllm import LLM, SamplingParams

    llm = LLM(request["model"], **(kernel() | request["engine_args"]))
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, prompt_logprobs=0
    )
    if request["engine_args"].get("pipeline_parallel_size", 1) > 1:
        # On a CPU vLLM makes what a stage receives into in a warm-up, which eager engines skip.
        llm.collective_rpc("execute_dummy_batch")
    outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
    quantization = str(llm.llm_engine.vllm_config.model_config.quantization)
    llm.llm_engine.engine_core.shutdown()  # its processes, if it has some, would be waited for
    return {
        "texts": [o.outputs[0].text for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "prompt_nats": [
            [
                -p[t].logprob
                for t, p in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
            ]
            for o in outputs
        ],
        "quantization": quantization,
    }
