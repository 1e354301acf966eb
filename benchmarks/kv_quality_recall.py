# SPDX-License-Identifier: Apache-2.0
"""Recall and loss of each policy at each keep share: one engine at a time, the same prompts."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result
from benchmarks.engine import in_process
from benchmarks.kv_engine import BLOCK, FORCED_TOKENS, POLICIES, KVEngine, contender, reported
from benchmarks.kv_prompts import Material, Sizes, material
from vllm_plugin.commands.judging.questions import ANSWER_TOKENS, Question, is_answered
from vllm_plugin.demo_model import demo_model_path

KEEPS = (0.50, 0.25, 0.10)
MEASURES = ("passkey", "needles", "nats")
NEWER = ("h2o", "r_kv", "expected_attention")
ROWS = (*POLICIES, *NEWER, "snap_kv_profile", "snap_kv_fp8", "cskv_16bit", "cskv_halves")
# cskv at its default and at the ratio of its paper too, and there without allocation.
KEEPS_OF = {"cskv": (*KEEPS, 0.20, 0.14), "cskv_16bit": (0.25, 0.20), "cskv_halves": (0.20,)}
SMOKE_SIZES = Sizes((160,), (0.5,), (160,), 2, 1, 2, 160, 8)
SMOKE_ROWS = ("fp8", "snap_kv_025")


@dataclass(frozen=True)
class Measured:
    """Whether each question was answered, by kind, and nats of each forced token of a window."""

    recalled: dict[str, list[bool]]
    nats: list[list[float]]


def rows(names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """(prefix of its keys, name, keep) of everything that is measured but the full cache."""
    for name in names:
        if name == "fp8":
            yield name, name, 1.0
        else:
            yield from (
                (f"{name}_{round(100 * keep):03}", name, keep) for keep in KEEPS_OF.get(name, KEEPS)
            )


def quality(options: Options, result: Result) -> None:
    """Fill P_K_passkey, P_K_needles, P_K_nats; the same for fp8 and snap_kv_profile; full_*."""
    model = demo_model_path()  # also with --smoke: a random model recalls nothing
    sizes = SMOKE_SIZES if options.smoke else Sizes()
    given = in_process(material, model, sizes, options.seed, preloaded=options.smoke)
    measure = Measure(model, given, sizes, options, result)
    full = measure.full()
    for prefix, name, keep in (bar := tqdm(list(rows(ROWS)), "quality", leave=False)):
        bar.set_postfix_str(prefix)
        failed: dict[str, str] = {}
        if options.smoke and prefix not in SMOKE_ROWS:
            failed[prefix] = "--smoke leaves it out"
        else:
            with reported(failed, prefix):
                arguments = contender(name, keep, model, options)
                record(result, prefix, measure(prefix, arguments), full)
        for what in MEASURES if failed else ():
            result.missing(f"{prefix}_{what}", failed[prefix])


def record(result: Result, prefix: str, seen: Measured, full: Measured) -> None:
    """Fill prefix_nats, prefix_nats_se and a recall for each kind of question."""
    for what, recalled in seen.recalled.items():
        known, key = full.recalled[what], f"{prefix}_{what}"
        if not any(known):
            result.missing(key, "the full cache recalls none of them")
            continue
        of_known = [ours for ours, theirs in zip(recalled, known, strict=True) if theirs]
        result.put(key, statistics.fmean(of_known), of_all=statistics.fmean(recalled))
    windows = [
        statistics.fmean(ours) - statistics.fmean(theirs)
        for ours, theirs in zip(seen.nats, full.nats, strict=True)
    ]
    result.put(f"{prefix}_nats", statistics.fmean(windows), windows=windows)
    result.put(f"{prefix}_nats_se", statistics.stdev(windows) / len(windows) ** 0.5)


class Measure:
    """Asks every question of one engine after the other.

    Args:
        model: What is served.
        given: Questions and windows.
        sizes: Of these.
        options: Of the benchmark.
        result: Answers go into its details.
        dtype: That engines compute in.
    """

    def __init__(
        self,
        model: Path,
        given: Material,
        sizes: Sizes,
        options: Options,
        result: Result,
        dtype: str = "bfloat16",
    ) -> None:
        self._model, self._given, self._context = model, given, sizes.context
        self._result = result
        self._arguments = {
            "block_size": BLOCK,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 1 << 30,  # all prompts of a kind at once, in 16 bits
            "dtype": dtype,
            "logits_processors": [FORCED_TOKENS],
            "preloaded": options.smoke,
        }

    def full(self) -> Measured:
        """The full cache; fills full_nats and a recall for each kind of question."""
        full = self("full", {"plugin": False})
        for what, recalled in full.recalled.items():
            self._result.put(f"full_{what}", statistics.fmean(recalled))
        self._result.put("full_nats", _mean(full.nats))
        return full

    def __call__(self, name: str, arguments: dict[str, Any]) -> Measured:
        with KVEngine(self._model, **self._arguments, **arguments) as engine:
            recalled = {
                what: self._recalled(engine, name, what, questions)
                for what, questions in self._given.questions.items()
            }
            windows = self._given.windows
            forced = engine.ask("forced_nats", windows=windows, context=self._context)
            nats = [one[1:] for one in forced]
            if name == "full":
                prompt = engine.ask("nats", windows=windows)
                same = [one[self._context :] for one in prompt]
                self._result.put("forced_minus_prompt_nats", _mean(nats) - _mean(same))
        return Measured(recalled, nats)

    def _recalled(
        self, engine: KVEngine, name: str, what: str, questions: list[Question]
    ) -> list[bool]:
        prompts = [question.prompt for question in questions]
        texts = engine.ask("complete", prompts=prompts, tokens=ANSWER_TOKENS)
        recalled = [
            is_answered(text, question.answer)
            for question, text in zip(questions, texts, strict=True)
        ]
        self._result.details[f"{name}_{what}_answers"] = [
            {"length": q.length, "depth": q.depth, "answer": q.answer, "text": text, "right": right}
            for q, text, right in zip(questions, texts, recalled, strict=True)
        ]
        return recalled


def _mean(nats: list[list[float]]) -> float:
    return statistics.fmean(statistics.fmean(window) for window in nats)
