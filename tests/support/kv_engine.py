# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines with KV policies, one after the other, each in a process of its own.

``run(model, cases)`` is the caller's side. A case is a dict: ``kv`` (the section ``compress.kv``,
or None for stock), ``engine`` (engine arguments), ``prompts`` (lists of token ids), ``max_tokens``,
``keep`` (per prompt, ``compress_keep``, a dict of extra arguments, or None), ``rounds`` (send all
prompts so many times),
``storm`` (abort at random times with this seed).

The answer has ``rounds`` (per prompt ``tokens`` and ``cached`` tokens, null if aborted early),
``free_before``, ``free_least`` and ``free_after`` blocks, ``freed`` blocks per group, ``held``
block tables and ``remembered`` prompts at the end, ``preemptions``, ``peak_running`` and ``steps``,
and ``sinks``: compressed layers that are scored with attention sinks.
"""

import os
import random
from pathlib import Path
from typing import Any

from tests.support.child import SINGLE_PROCESS, in_child, kernel

ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 28,
    "gpu_memory_utilization": 0.2,
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 2048,
}


def _fastest() -> dict[str, Any]:
    """In a child: the type that is fast here. Without AVX-512 bfloat16 takes ten times as long."""
    import torch

    if torch.cuda.is_available() or torch.cpu._is_avx512_supported():
        return {}
    return {"dtype": "float32", "kv_cache_memory_bytes": 2 * ENGINE["kv_cache_memory_bytes"]}


def run(
    model: Path | str, cases: list[dict[str, Any]], timeout: float = 1100
) -> list[dict[str, Any]]:
    """The answers, one per case; EngineFailed when an engine does not start or dies."""
    # One thread: small models gain nothing from two, and lose much when others run beside.
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule kv_cache_memory_bytes
    return [in_child(_run, str(model), case, env=environment, timeout=timeout) for case in cases]


def _run(model: str, case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    config = {"compress": {"kv": case["kv"]}} if case["kv"] else {}
    stock = {} if case["kv"] else kernel()
    llm = LLM(
        model, additional_config=config, **(ENGINE | _fastest() | stock | case.get("engine", {}))
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler, pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
    free_before = free_least = pool.get_num_free_blocks()
    keeps = case.get("keep") or [None] * len(case["prompts"])
    draw = random.Random(case.get("storm"))
    rounds, peak, steps, preemptions = [], 0, 0, 0
    for number in range(case.get("rounds", 1)):
        seen: dict[str, Any] = {}
        for index, (prompt, keep) in enumerate(zip(case["prompts"], keeps, strict=True)):
            extra = keep if isinstance(keep, dict | None) else {"compress_keep": keep}
            sampling = SamplingParams(
                temperature=0,
                max_tokens=case.get("max_tokens", 8),
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            engine.add_request(f"{number}-{index}", TokensPrompt(prompt_token_ids=prompt), sampling)
        counts: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = output
            steps += 1
            free_least = min(free_least, pool.get_num_free_blocks())
            peak = max(peak, len(scheduler.running))
            for name, one in scheduler.requests.items():
                counts[name] = max(counts.get(name, 0), one.num_preemptions)
            if case.get("storm") is not None and draw.random() < 0.4 and scheduler.requests:
                engine.abort_request([draw.choice(sorted(scheduler.requests))], internal=True)
        preemptions += sum(counts.values())
        order = [seen.get(f"{number}-{index}") for index in range(len(case["prompts"]))]
        rounds.append(
            [
                one and {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens}
                for one in order
            ]
        )
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    worker = core.model_executor.driver_worker.worker
    batch = getattr(worker, "batch", None)
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    builders = [group.get_metadata_builder() for group in groups]
    compressed = [layer for one in builders for layer in getattr(one, "layers", ())]
    return {
        "rounds": rounds,
        "free_before": free_before,
        "free_least": free_least,
        "free_after": pool.get_num_free_blocks(),
        "freed": [getattr(manager, "freed_blocks", None) for manager in managers],
        "held": sum(len(manager.req_to_blocks) for manager in managers),
        "peak_running": peak,
        "steps": steps,
        "preemptions": preemptions,
        "sinks": sum(getattr(layer, "sinks", None) is not None for layer in compressed),
        "remembered": len(batch.observations) if batch else 0,
    }
