# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, its metrics read after every step.

``watch(model, kv, prompts, max_tokens, extra)`` is the caller's side; ``weights`` and ``diffusion``
are those sections, ``stop`` has token ids. The answer has ``start``, the plugin's series before
the first request, ``steps``: per step the pool's ``free`` blocks, the ``columns`` of all block
tables, the most blocks that are ``live`` in one of them, whether a request ``finished``, and the
plugin's series, of each step or of ``every`` so many (else None); ``end``, its series when all is
done, ``page``, what ``/metrics`` would then say, ``refused``, the places of prompts that were
refused, and ``tokens`` per request. A series is its name and labels as Prometheus prints them.
"""

import os
from pathlib import Path
from typing import Any

from tests.support.child import SINGLE_PROCESS, in_child, kernel
from tests.support.kv_engine import ENGINE


def watch(model: Path | str, **case: Any) -> dict[str, Any]:
    """The answer; EngineFailed when the engine does not start or dies."""
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return in_child(_watch, case | {"model": str(model)}, env=environment, timeout=600)


def series() -> dict[str, float]:
    """The plugin's samples of this process, by name and labels without model_name and engine."""
    from prometheus_client import REGISTRY

    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("vllm_compress_") and not sample.name.endswith("_created"):
                labels = {
                    k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")
                }
                key = sample.name.removeprefix("vllm_compress_")
                found[" ".join([key, *(f"{k}={v}" for k, v in sorted(labels.items()))])] = (
                    sample.value
                )
    return found


def _watch(case: dict[str, Any]) -> dict[str, Any]:
    from prometheus_client import generate_latest
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError

    arguments = ENGINE | ({} if case.get("kv") else kernel()) | case.get("engine", {})
    llm = LLM(
        case["model"],
        additional_config={
            "compress": {
                name: case[name] for name in ("kv", "weights", "diffusion") if case.get(name)
            }
        },
        disable_log_stats=False,
        **arguments,
    )
    engine = llm.llm_engine
    if arguments.get("pipeline_parallel_size", 1) > 1:
        # On a CPU vLLM makes what a stage receives into in a warm-up, which eager engines skip.
        llm.collective_rpc("execute_dummy_batch")
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    start, steps, refused = series(), [], []
    tokens: dict[str, list[int]] = {}
    free = manager.block_pool.get_num_free_blocks()
    for index, (prompt, extra) in enumerate(zip(case["prompts"], case["extra"], strict=True)):
        sampling = SamplingParams(
            temperature=0,
            max_tokens=case["max_tokens"],
            ignore_eos=True,
            stop_token_ids=case.get("stop"),
            detokenize=not arguments.get("skip_tokenizer_init"),
            extra_args=extra,
        )
        try:
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), sampling)
        except VLLMValidationError:
            refused.append(index)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        tokens |= {one.request_id: list(one.outputs[0].token_ids) for one in outputs}
        managers = manager.coordinator.single_type_managers
        tables = [blocks for one in managers for blocks in one.req_to_blocks.values()]
        live = (sum(not block.is_null for block in blocks) for blocks in tables)
        steps.append(
            {
                "free": manager.block_pool.get_num_free_blocks(),
                "columns": sum(map(len, tables)),
                "live": max(live, default=0),
                "finished": any(output.finished for output in outputs),
                "series": None if len(steps) % case.get("every", 1) else series(),
            }
        )
    end = series()
    engine.engine_core.shutdown()  # its processes, if it has some, would be waited for
    return {
        "start": start,
        "free": free,
        "steps": steps,
        "end": end,
        "page": generate_latest().decode(),
        "refused": refused,
        "tokens": [tokens.get(str(index)) for index in range(len(case["prompts"]))],
    }
