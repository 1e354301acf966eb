# SPDX-License-Identifier: Apache-2.0
"""One engine of a vision-language model that chats about pictures, and its metrics.

``chat_about(model, requests, **engine_args)`` is the caller's side. A request is a picture's seed
and its ``extra_args``. The answer has, per request, the ``prompt`` and its greedy ``tokens``, their
``text`` and ``nats``, and the ``cached`` tokens; and the plugin's ``series`` at the end.
"""

import os
from pathlib import Path
from typing import Any

from benchmarks.kv_vision import chat
from tests.support.child import SINGLE_PROCESS, in_child, kernel
from tests.support.kv_engine import ENGINE
from tests.support.metrics_engine import series

Requests = list[tuple[int, dict[str, Any] | None]]


def chat_about(
    model: Path, requests: Requests, tokens: int = 12, **engine_args: Any
) -> dict[str, Any]:
    """The answers; EngineFailed when the engine does not start or dies."""
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    request = str(model), requests, tokens, engine_args
    return in_child(_chat_about, *request, env=environment, timeout=300)


def _chat_about(
    model: str, requests: Requests, count: int, engine_args: dict[str, Any]
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    arguments = ENGINE | {
        "skip_tokenizer_init": False,
        "max_model_len": 512,
        "dtype": "float32",
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "disable_log_stats": False,
    }
    stock = {} if "additional_config" in engine_args else kernel()
    llm = LLM(model, **(arguments | stock | engine_args))
    answers = []
    for seed, extra in requests:
        sampling = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, extra_args=extra
        )
        (output,) = llm.chat(chat(seed)["messages"], sampling, use_tqdm=False)
        made = output.outputs[0]
        steps = zip(made.token_ids, made.logprobs, strict=True)
        answers.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(made.token_ids),
                "text": made.text,
                "nats": [-step[token].logprob for token, step in steps],
                "cached": output.num_cached_tokens,
            }
        )
    found = {"answers": answers, "series": series()}
    llm.llm_engine.engine_core.shutdown()
    return found
