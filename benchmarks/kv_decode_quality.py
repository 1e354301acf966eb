# SPDX-License-Identifier: Apache-2.0
"""Recall and loss in long decode, of each policy at each budget: one engine at a time.

Forcing thousands of tokens one by one through an engine takes many times as long as computing them
at once. A request that was preempted does the latter: it computes its prompt and its generated
tokens as one prefill, in which each window ends and is compacted where it would have been. So texts
are those of resumed requests, and ``resumed_minus_decoded_nats`` says that this is the same.
"""

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result
from benchmarks.engine import in_process
from benchmarks.kv_engine import (
    BLOCK,
    FORCED_TOKENS,
    KVEngine,
    computed_dtype,
    contender,
    policy,
    reported,
)
from benchmarks.kv_prompts import ASK_NEEDLE, CITIES, NEEDLE
from benchmarks.texts import opticks
from vllm_plugin.commands.judging.forced_tokens import FREE
from vllm_plugin.commands.judging.questions import FILLER, is_answered
from vllm_plugin.demo_model import demo_model_path

BUDGETS = (512, 256, 1024)  # the most telling first
WINDOW = 128
MEASURES = ("recall", "nats")
# snap_kv leaves decode windows to key_diff by default, and would be the same row here.
POLICIES: dict[str, dict[str, Any]] = {
    "h2o": {},
    "snap_kv": {"decode_queries": 16},
    "r_kv": {},
    "expected_attention": {},
    "key_diff": {},
    "key_diff_recent": {"name": "key_diff", "recent": 0.125},
    "recent": {},
}
# Asked at one budget: what else key_diff could be set to.
MORE_AT = 512
MORE: dict[str, dict[str, Any]] = {
    "key_diff_recent_16th": {"name": "key_diff", "recent": 0.0625},
    "key_diff_recent_4th": {"name": "key_diff", "recent": 0.25},
    "key_diff_window_256": {"name": "key_diff", "recent": 0.125, "decode_window": 256},
}
UNBOUNDED = ("cskv", "fp8")
_CSKV_KEEP = 0.14  # its default
THIRDS = ("early", "middle", "late")
SMOKE_ROWS = ("h2o_256",)


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts, of generated text, of an answer and of a continuation; texts of each kind,
    facts in each; tokens of a text that is decoded too."""

    prompt: int = 64
    text: int = 2000
    texts: int = 4
    facts: int = 6
    answer: int = 8
    books: int = 3
    continuation: int = 128
    decoded: int = 600


SMOKE_SIZES = Sizes(32, 360, 1, 3, 8, 2, 16, 360)


@dataclass(frozen=True)
class Material:
    """Requests as ``KVChild.grown`` takes them.

    Attributes:
        asked: Texts with facts, each with questions behind it.
        answers: Of each of these, the number and where the answer begins, per question.
        books: Texts that go on.
        tokenizer: To read answers.
    """

    asked: list[tuple[list[int], list[int]]]
    answers: list[list[tuple[str, int]]]
    books: list[tuple[list[int], list[int]]]
    tokenizer: Path


@dataclass(frozen=True)
class Measured:
    """Of each question whether it was answered, of each book nats per token."""

    recalled: list[list[bool]]
    nats: list[float]


def rows() -> Iterator[tuple[str, str, int]]:
    """(prefix of its keys, policy, budget) of all but the full cache."""
    for budget in BUDGETS:
        yield from ((f"{name}_{budget}", name, budget) for name in POLICIES)
    yield from ((f"{name}_{MORE_AT}", name, MORE_AT) for name in MORE)
    yield from ((name, name, 0) for name in UNBOUNDED)


def material(model: Path, sizes: Sizes, seed: int) -> Material:
    """Everything, in the model's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(seed)
    filler = tokenizer.encode(FILLER)
    filler *= (sizes.prompt + sizes.text) // len(filler) + 1
    asked, answers = [], []
    for _ in range(sizes.texts):
        cities = draw.sample(CITIES, sizes.facts)
        numbers = [str(number) for number in draw.sample(range(1000, 10_000), sizes.facts)]
        facts = [
            tokenizer.encode(NEEDLE.format(*pair)) for pair in zip(cities, numbers, strict=True)
        ]
        plain = sizes.text - sum(map(len, facts))
        text: list[int] = []
        at = sizes.prompt
        for index, fact in enumerate(facts):
            stop = sizes.prompt + int((index + 0.5) / sizes.facts * plain)
            text += filler[at:stop] + fact
            at = stop
        text += filler[at : sizes.prompt + plain]
        begins = []
        for city, number in zip(cities, numbers, strict=True):
            text += tokenizer.encode(ASK_NEEDLE.format(city))
            begins.append((number, len(text)))  # tokens before the answer
            text += [FREE] * sizes.answer
        asked.append((filler[: sizes.prompt], text))
        answers.append(begins)
    book = tokenizer.encode(opticks()[1])
    length = sizes.prompt + sizes.text + sizes.continuation
    stride = len(book) // sizes.books
    windows = [book[index * stride :][:length] for index in range(sizes.books)]
    books = [(window[: sizes.prompt], window[sizes.prompt :]) for window in windows]
    return Material(asked, answers, books, model)


def quality(options: Options, result: Result) -> None:
    """Fill P_B_recall, P_B_nats, those of full and fp8, and resumed_minus_decoded_nats."""
    model = demo_model_path()  # also with --smoke: a random model recalls nothing
    sizes = SMOKE_SIZES if options.smoke else Sizes()
    given = in_process(material, model, sizes, options.seed, preloaded=options.smoke)
    measure = _Measure(given, sizes, options, result)
    full = measure("full", {"plugin": False})
    result.put("full_recall", statistics.fmean(sum(full.recalled, [])))
    result.put("full_nats", statistics.fmean(full.nats))
    for prefix, name, budget in (bar := tqdm(list(rows()), "quality", leave=False)):
        bar.set_postfix_str(prefix)
        failed: dict[str, str] = {}
        if options.smoke and prefix not in SMOKE_ROWS:
            failed[prefix] = "--smoke leaves it out"
        elif options.rows and prefix not in options.rows:
            failed[prefix] = "it was not asked for (--row)"
        else:
            with reported(failed, prefix):
                if name in UNBOUNDED:
                    arguments = contender(name, _CSKV_KEEP, model, options)
                else:
                    window = 64 if options.smoke else WINDOW
                    kv = {"name": name, "decode_window": window} | (POLICIES | MORE)[name]
                    arguments = policy(**kv, budget=budget)
                _record(result, prefix, measure(prefix, arguments), full)
        for what in MEASURES if failed else ():
            result.missing(f"{prefix}_{what}", failed[prefix])


def _record(result: Result, prefix: str, seen: Measured, full: Measured) -> None:
    pairs = [
        (at * len(THIRDS) // len(known), ours)
        for recalled, known in zip(seen.recalled, full.recalled, strict=True)
        for at, (ours, theirs) in enumerate(zip(recalled, known, strict=True))
        if theirs
    ]
    if pairs:
        result.put(f"{prefix}_recall", statistics.fmean(ours for _, ours in pairs))
        for third, name in enumerate(THIRDS):
            if part := [ours for at, ours in pairs if at == third]:
                result.put(f"{prefix}_recall_{name}", statistics.fmean(part))
    else:
        result.missing(f"{prefix}_recall", "the full cache recalls none of them")
    losses = [a - b for a, b in zip(seen.nats, full.nats, strict=True)]
    result.put(f"{prefix}_nats", statistics.fmean(losses), texts=losses)
    result.put(f"{prefix}_nats_se", statistics.stdev(losses) / len(losses) ** 0.5)


class _Measure:
    """Lets each engine generate the same texts."""

    def __init__(self, given: Material, sizes: Sizes, options: Options, result: Result) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
        self._given, self._sizes, self._result = given, sizes, result
        self._arguments = {
            "block_size": BLOCK,
            "max_model_len": 4096,
            "kv_cache_memory_bytes": 1 << 31,
            "max_num_seqs": 16,
            "dtype": computed_dtype(),
            "logits_processors": [FORCED_TOKENS],
            "async_scheduling": False,  # a preempted request is changed between two steps
            "preloaded": options.smoke,
        }

    def __call__(self, name: str, arguments: dict[str, Any]) -> Measured:
        given, text = self._given, self._sizes.text
        with KVEngine(given.tokenizer, **self._arguments, **arguments) as engine:
            answers = engine.ask("grown", requests=given.asked + given.books, at_once=text)
            if name.endswith("_256") and "resumed_minus_decoded_nats" not in self._result.values:
                self._compare(engine)
        recalled = []
        for answer, questions in zip(answers, given.answers, strict=False):
            said = [
                self._tokenizer.decode(answer["tokens"][begin - text :][: self._sizes.answer])
                for _, begin in questions
            ]
            recalled.append(
                [
                    is_answered(text, number)
                    for text, (number, _) in zip(said, questions, strict=True)
                ]
            )
            self._result.details.setdefault(f"{name}_answers", []).append(said)
        books = answers[len(given.asked) :]
        nats = [statistics.fmean(one["nats"][-self._sizes.continuation :]) for one in books]
        return Measured(recalled, nats)

    def _compare(self, engine: KVEngine) -> None:
        """Fill resumed_minus_decoded_nats: the largest difference at a token of one text."""
        prompt, forced = self._given.books[0]
        text = self._sizes.decoded
        forced = forced[: text + self._sizes.continuation]
        ways = [
            engine.ask("grown", requests=[(prompt, forced)], at_once=at_once)[0]["nats"]
            for at_once in (text, 1)
        ]
        pairs = zip(ways[0], ways[1][text - 1 :], strict=True)
        self._result.put("resumed_minus_decoded_nats", max(abs(a - b) for a, b in pairs))
