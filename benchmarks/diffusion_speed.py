# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of each policy in the engine, and the cost of a step beside the model."""

import random
from contextlib import ExitStack
from typing import Any

from benchmarks import tiny_llada
from benchmarks.common import Options, Result, alternate
from benchmarks.diffusion_quality import POLICIES
from benchmarks.engine import Engine, in_process
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.reference import generate
from dllm_denoising.registry import build_policy
from dllm_denoising.settings import Decoding

PROMPT, CANVAS = 256, 256
RAGGED = (256, 296, 320, 352, 400, 432, 480, 512)  # tokens, half of them prompt, half canvas

BATCH8 = {  # policies that serve the ragged requests, and the key of the gain
    "fixed_period": "batch8_ratio",
    "never": "batch8_ratio_never",
    "dual_cache": "batch8_ratio_dual_cache",
}


class DiffusionEngine(Engine):
    """An engine that runs ``DiffusionChild``."""

    child = "benchmarks.diffusion_child:DiffusionChild"


def _engine(policy: str, options: Options) -> DiffusionEngine:
    _, decoding = POLICIES[policy]
    section = {"policy": policy, "tokens_per_step": 2, **decoding}
    return DiffusionEngine(
        tiny_llada.folder(),
        dtype="float32",
        max_model_len=512,
        hf_overrides={"max_sequence_length": 512},  # trained on 128: only the time counts here
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=1 << 28,
        additional_config={"compress": {"diffusion": section}},
        preloaded=options.smoke,
    )


def speed(options: Options, result: Result) -> None:
    """Fill P_tokens_per_s_ratio, parallel_only_ratio, batch8_ratio and overhead_share."""
    canvas = 32 if options.smoke else CANVAS
    one: dict[str, Any] = {"shapes": [(PROMPT, canvas)], "seed": options.seed}
    ragged = [(total // 2, canvas if options.smoke else total // 2) for total in RAGGED]
    with ExitStack() as stack:
        engines = {name: stack.enter_context(_engine(name, options)) for name in POLICIES}
        asks: dict[str, tuple[str, dict[str, Any]]] = {name: (name, one) for name in POLICIES}
        asks["one a step"] = ("full", one | {"extra": {"compress_tokens_per_step": 1}})
        eight: dict[str, Any] = {"shapes": ragged, "seed": options.seed}
        for policy in BATCH8:
            asks[f"{policy}, ragged"] = (policy, eight)
            asks[f"{policy}, alone"] = (policy, eight | {"alone": True})

        def measure(name: str) -> dict[str, float]:
            policy, request = asks[name]
            return engines[policy].ask("denoise", **request)

        samples = alternate(list(asks), options.rounds, measure, "speed")
    rates = {name: [s["tokens_per_s"] for s in seen] for name, seen in samples.items()}
    result.details["tokens_per_s"] = rates
    for name in POLICIES:
        result.ratio(f"{name}_tokens_per_s_ratio", rates[name], rates["full"])
    result.ratio("parallel_only_ratio", rates["full"], rates["one a step"])
    for name, key in BATCH8.items():
        result.ratio(key, rates[f"{name}, ragged"], rates[f"{name}, alone"])
    overhead = [s["overhead_share"] for s in samples["fixed_period, ragged"]]
    result.median("overhead_share", overhead)
    for name in ("full", "elastic"):
        result.median(f"overhead_share_{name}", [s["overhead_share"] for s in samples[name]])
    for name, share in in_process(_token_layers, PROMPT, canvas, options.seed).items():
        result.put(f"{name}_token_layers_ratio_512", share)


def _token_layers(prompt: int, canvas: int, seed: int) -> dict[str, float]:
    """Return what each policy computes of the timed request, relative to ``full``."""
    draw = random.Random(seed)
    tokens = [draw.randrange(10) for _ in range(prompt)]
    model = tiny_llada.load(tiny_llada.folder())
    layers, found = model.shape.n_layers, {}
    for name, (settings, decoding) in POLICIES.items():
        denoiser = Denoiser(
            tokens,
            canvas,
            Decoding(tokens_per_step=2, **decoding),
            build_policy(name, settings),
            mask=tiny_llada.MASK,
            layers=layers,
        )
        length = len(denoiser.canvas)
        plans = generate(model, denoiser).plans
        computed = sum(plan.token_layers(length, layers) for plan in plans)
        found[name] = computed / (len(plans) * length * layers)
    return found
