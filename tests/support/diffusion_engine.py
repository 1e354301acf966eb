# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines that denoise, one after the other, each in a process of its own.

``run(model, cases)`` is the caller's side. A case is a dict: ``section`` (``compress.diffusion``),
``engine`` (engine arguments), ``requests`` (dicts with ``prompt``, token ids, ``max_tokens``, and
if wanted ``temperature``, ``seed``, ``extra``, ``refused``), ``alone`` (one request at a time),
``rounds`` (send all so many times), ``storm`` (abort at random times with this seed), ``resets``
(engine steps after which all running requests lose their blocks), ``padded`` (pad steps as for CUDA
graphs), ``measure`` (see ``set_aside``; both on CPU alone).

The answer has ``rounds`` (tokens per request, null if aborted), ``reasons`` (why each request of
the last round ended), ``pieces`` (how many outputs each of them had), ``free_before`` and
``free_after`` blocks, ``held`` requests of the worker, ``peak_running``, ``preemptions``,
``resumed`` requests after resets, ``steps``, ``set_aside`` bytes for a step, and ``chunked`` and
``cached``, whether the engine cuts prompts and caches prefixes. ``padded`` counts padded steps by
their shape.
"""

import os
import random
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dllm_denoising.base import Plan
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.dense import DenseLLaDA
from dllm_denoising.reference import generate
from tests.support.child import SINGLE_PROCESS, in_child, kernel
from vllm_plugin.diffusion.settings import DiffusionSettings

MASK, STOP = 63, 1  # of ``tests.support.llada``
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",  # the reference's; in bfloat16 near-equal probabilities change places
    "max_model_len": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 26,
    "gpu_memory_utilization": 0.2,
}


def run(
    model: Path, cases: list[dict[str, Any]], timeout: float = 800, v2: bool = False
) -> list[dict[str, Any]]:
    """The answers, one per case; EngineFailed when an engine does not start or dies.

    v2: with Model Runner V2, in Triton's interpreter.
    """
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks share what cores there are
    environment["TRITON_F32_DEFAULT"] = "ieee"  # a GPU would take TF32, the reference does not
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if v2:
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    # Triton reads its variables when it is imported.
    return [
        in_child(_run, str(model), case, v2, env=environment, timeout=timeout, fresh=v2)
        for case in cases
    ]


def some_requests(count: int, seed: int = 0, **others: Any) -> list[dict[str, Any]]:
    """Ragged random requests of 3 to 60 tokens and canvases of 5 to 60."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(3, 60) for _ in range(draw.randrange(3, 60))],
            "max_tokens": draw.randrange(5, 60),
            **others,
        }
        for _ in range(count)
    ]


def expected(
    model: DenseLLaDA,
    section: dict[str, Any],
    request: dict[str, Any],
    mask: int = MASK,
    stops: Collection[int] = (STOP,),
    restarts: Collection[int] = (),
) -> tuple[list[int], list[Plan]]:
    """What the dense reference gives, and the plans of its steps.

    restarts: see ``reference.generate``. An engine caps ``max_tokens`` at its longest length.
    """
    asked = {key.removeprefix("compress_"): v for key, v in request.get("extra", {}).items()}
    settings = DiffusionSettings(**section).for_request(asked)
    denoiser = Denoiser(
        request["prompt"],
        min(request["max_tokens"], ENGINE["max_model_len"] - len(request["prompt"])),
        settings.decoding(),
        settings.build(),
        mask=mask,
        layers=model.shape.n_layers,
        stops=stops,
        temperature=request.get("temperature", 0),
        seed=request.get("seed", 0),
    )
    torch.set_num_threads(1)  # two, beside anything else, wait for each other at every product
    found = generate(model, denoiser, restarts=restarts)
    return found.tokens, found.plans


def _pretend_triton_has_a_cpu_backend() -> None:
    """vLLM's CPU build refuses Model Runner V2 without one; the interpreter needs none."""
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def _run(model: str, case: dict[str, Any], v2: bool) -> dict[str, Any]:
    if v2:
        _pretend_triton_has_a_cpu_backend()
    from vllm import LLM

    from vllm_plugin.diffusion import graphs

    if case.get("padded"):
        graphs.PADDED_ON.add("cpu")
    config = {"compress": {"diffusion": case["section"]}}
    llm = LLM(model, additional_config=config, **(ENGINE | kernel() | case.get("engine", {})))
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler, pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
    free_before = pool.get_num_free_blocks()
    worker = getattr(getattr(core.model_executor, "driver_worker", None), "worker", None)
    padded = _counted(worker.forward) if worker is not None else None
    watch = _Watch(engine, scheduler, case.get("storm"), case.get("resets", ()))
    rounds = []
    for number in range(case.get("rounds", 1)):
        names = [f"{number}-{index}" for index in range(len(case["requests"]))]
        for name, request in zip(names, case["requests"], strict=True):
            _add(engine, name, request)
            if case.get("alone"):
                watch.drain()
        watch.drain()
        rounds.append([watch.tokens(name) for name in names])
    set_aside = _set_aside(worker) if case.get("measure") else None
    engine.step()  # tells the worker of the last requests that have ended
    result = {
        "rounds": rounds,
        "reasons": [watch.reason(name) for name in names],
        "pieces": [watch.pieces[name] for name in names],
        "free_before": free_before,
        "free_after": pool.get_num_free_blocks(),
        "held": len(worker._running) if worker is not None else None,
        "sized": len(scheduler._next_rows),
        "peak_running": watch.peak,
        "preemptions": watch.preemptions,
        "resumed": watch.resumed,
        "set_aside": set_aside,
        "padded": padded,
        "steps": watch.steps,
        "v2": scheduler.use_v2_model_runner,
        "chunked": scheduler.scheduler_config.enable_chunked_prefill,
        "cached": scheduler.cache_config.enable_prefix_caching,
    }
    if worker is None:
        engine.engine_core.shutdown()  # or its processes would be waited for
    return result


def _counted(forward: Any) -> Counter[tuple[int, int]]:
    """Count the passes of each shape from now on: rows and requests."""
    counts = Counter[tuple[int, int]]()

    def counting(shape: Any, run: Any) -> Any:
        def counted() -> None:
            counts[shape.rows, shape.requests] += 1
            run()

        return counted

    forward._passes = {shape: counting(shape, run) for shape, run in forward._passes.items()}
    return counts


def _set_aside(worker: Any) -> int:
    """Bytes that the worker leaves over of a cache that vLLM would size by free memory."""
    import psutil

    cache = worker.cache_config
    fixed, cache.kv_cache_memory_bytes = cache.kv_cache_memory_bytes, None
    worker.requested_cpu_memory = psutil.Process().memory_info().rss + (1 << 30)
    stock = super(type(worker), worker).determine_available_memory()
    left = worker.determine_available_memory()
    cache.kv_cache_memory_bytes = fixed
    return stock - left


class _Watch:
    """Steps an engine until it is idle, and remembers what it saw."""

    def __init__(
        self, engine: Any, scheduler: Any, storm: int | None, resets: Collection[int]
    ) -> None:
        self._engine, self._scheduler, self._resets = engine, scheduler, resets
        self._draw = None if storm is None else random.Random(storm)
        self._seen: dict[str, Any] = {}
        self.pieces = Counter[str]()
        self.peak = self.preemptions = self.steps = self.resumed = 0

    def drain(self) -> None:
        requests = self._scheduler.requests
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                self._seen[output.request_id] = output
                self.pieces[output.request_id] += 1
            self.steps += 1
            self.peak = max(self.peak, len(self._scheduler.running))
            self.preemptions += sum(one.num_preemptions for one in requests.values())
            if self._draw is not None and requests and self._draw.random() < 0.3:
                self._engine.abort_request([self._draw.choice(sorted(requests))], internal=True)
            if self.steps in self._resets:
                self.resumed += len(self._scheduler.running)
                assert self._engine.reset_prefix_cache(reset_running_requests=True)

    def reason(self, name: str) -> str | None:
        output = self._seen.get(name)
        return None if output is None else output.outputs[0].finish_reason

    def tokens(self, name: str) -> list[int] | None:
        output = self._seen.get(name)
        if output is None or not output.finished:
            return None
        return list(output.outputs[0].token_ids)


def _add(engine: Any, name: str, request: dict[str, Any]) -> None:
    from vllm import SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError

    sampling = SamplingParams(
        temperature=request.get("temperature", 0),
        seed=request.get("seed"),
        max_tokens=request["max_tokens"],
        stop_token_ids=[STOP],
        detokenize=False,
        extra_args=request.get("extra"),
    )
    prompt = TokensPrompt(prompt_token_ids=request["prompt"])
    if not request.get("refused"):
        engine.add_request(name, prompt, sampling)
        return
    try:
        engine.add_request(name, prompt, sampling)
    except VLLMValidationError:
        return
    raise AssertionError("an engine must refuse this request")
