# SPDX-License-Identifier: Apache-2.0
"""Accuracy, divergence and cost of each policy, on the dense reference."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import tiny_llada
from benchmarks.common import Options, Result
from benchmarks.engine import in_process
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.dense import DenseLLaDA
from dllm_denoising.reference import Step, generate
from dllm_denoising.registry import build_policy
from dllm_denoising.settings import Decoding

MEASURES = ("accuracy", "kl", "tokens_per_forward", "token_layers_ratio", "refresh_share")
WINDOW = {"window_length": 16}
BLOCKS = {"block_length": 16}
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, WINDOW),
    "never": ({}, WINDOW),
    "fixed_period": ({}, WINDOW),
    "dual_cache": ({}, BLOCKS),
    "elastic": ({}, WINDOW),
}
LENGTHS = (32, 48, 64)
COUNT = 16  # prompts for each task and length


@dataclass(frozen=True)
class Contender:
    """A policy with settings. ``label`` names a point of the curve."""

    name: str
    settings: dict[str, Any]
    decoding: dict[str, Any]
    in_step: bool = False
    label: str = ""


def curve() -> Iterator[Contender]:
    """Yield settings other than the defaults."""
    for period in (2, 3, 6, 8, 12):
        yield Contender("fixed_period", {"period": period}, WINDOW, label=f"period {period}")
    for gamma in (0.5, 0.8, 0.95, 0.98, 0.99, 1.0):
        yield Contender("elastic", {"gamma": gamma}, WINDOW, label=f"gamma {gamma}")
        yield Contender(
            "elastic", {"gamma": gamma}, WINDOW, in_step=True, label=f"gamma {gamma}, in step"
        )
    for gamma in (0.5, 0.9, 1.0):
        settings = {"gamma": gamma, "similarity": "heads"}
        yield Contender("elastic", settings, WINDOW, label=f"heads, gamma {gamma}")
    yield Contender("elastic", {"track": 4}, WINDOW, label="track 4")
    for block in (8, 32):
        yield Contender("dual_cache", {}, {"block_length": block}, label=f"block {block}")
    for tokens in (1, 2, 4):
        rule = {"tokens_per_step": tokens, **WINDOW}
        yield Contender("full", {}, rule, label=f"{tokens} a step")


def quality(options: Options, result: Result) -> None:
    """Fill P_accuracy, P_kl, P_tokens_per_forward, P_token_layers_ratio, P_refresh_share."""
    named = {
        name: Contender(name, settings, decoding) for name, (settings, decoding) in POLICIES.items()
    }
    named["elastic_in_step"] = Contender("elastic", {}, WINDOW, in_step=True)
    more = [] if options.smoke else list(curve())
    measured = in_process(_all, [*named.values(), *more], options.smoke, options.seed)
    full = measured[0]["token_layers"]
    for one in measured:
        one["token_layers_ratio"] = one.pop("token_layers") / full
    for name, one in zip(named, measured, strict=False):
        for key in MEASURES:
            result.put(f"{name}_{key}", one[key])
    result.details["curve"] = [
        {"policy": one.name, "label": one.label, "in_step": one.in_step} | seen
        for one, seen in zip([*named.values(), *more], measured, strict=True)
    ]


def _all(contenders: list[Contender], smoke: bool, seed: int) -> list[dict[str, float]]:
    torch.set_num_threads(1)  # a tiny model gains nothing from two
    model = tiny_llada.load(tiny_llada.folder())
    asked = [
        prompt
        for task in tiny_llada.TASKS
        for length in (LENGTHS[:1] if smoke else LENGTHS)
        for prompt in tiny_llada.prompts(task, 2 if smoke else COUNT, length, 100 + seed)
    ]
    return [_one(model, asked, one) for one in tqdm(contenders, "quality", leave=False)]


def _one(
    model: DenseLLaDA, asked: list[tuple[list[int], list[int]]], contender: Contender
) -> dict[str, float]:
    layers = model.shape.n_layers
    right, divergence = [], []
    steps = refreshes = token_layers = tokens = 0
    for prompt, answer in asked:
        room = math.ceil(len(answer) / 16) * 16
        denoiser = Denoiser(
            prompt,
            room,
            Decoding(**contender.decoding),
            build_policy(contender.name, contender.settings),
            mask=tiny_llada.MASK,
            layers=layers,
            stops={tiny_llada.EOS},
        )

        def seen(step: Step) -> None:
            divergence.append(_kl(model, step))

        found = generate(model, denoiser, contender.in_step, seen)
        got = found.tokens + [tiny_llada.EOS] * len(answer)
        right.append(statistics.fmean(a == b for a, b in zip(got, answer, strict=False)))
        steps += len(found.plans)
        refreshes += sum(plan.start < layers for plan in found.plans)
        length = len(denoiser.canvas)
        token_layers += sum(plan.token_layers(length, layers) for plan in found.plans)
        tokens += len(found.tokens)
    return {
        "accuracy": statistics.fmean(right),
        "kl": statistics.fmean(divergence),
        "tokens_per_forward": tokens / steps,
        "token_layers": token_layers,
        "refresh_share": refreshes / steps,
    }


def _kl(model: DenseLLaDA, step: Step) -> float:
    """Return the KL divergence of a step's predictions from those of a forward without a cache."""
    exact = model(torch.from_numpy(step.tokens)[None])[0, torch.from_numpy(step.plan.active)]
    exact, mine = (x.double().log_softmax(-1) for x in (exact, step.logits))
    return float((exact.exp() * (exact - mine)).sum(-1).mean())
