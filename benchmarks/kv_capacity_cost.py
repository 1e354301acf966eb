# SPDX-License-Identifier: Apache-2.0
"""What KV policies cost in time: engines that take turns."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.common import Options, Result, alternate
from benchmarks.kv_capacity_plan import plan
from benchmarks.kv_engine import (
    BLOCK,
    KVEngine,
    bench_model,
    contender,
    made_up_profile,
    policy,
    reported,
)
from compress_common.calibration.precision import slow_in_16_bit

KEEP = 0.25
PREFILL = 2000
KEEP100, STOCK, DEFAULT = "snap_kv, keep 1.0", "stock", "stock, its own block size"


def cost(options: Options, result: Result) -> None:
    """Fill plan_ms_*, keep100_*, compaction_share_*, builder_ms_* and levels4_*."""
    plan(options, result)
    with ExitStack() as stack:
        turns = _Turns(stack, options, result)
        for measure in (_keep100, _compaction, _levels):
            measure(turns)


class _Turns:
    """Engines by name, all of the benchmark's model; those that cannot start are left out."""

    def __init__(self, stack: ExitStack, options: Options, result: Result) -> None:
        self.options, self.result = options, result
        self.model = bench_model(options)
        self._stack = stack
        self._engines: dict[str, KVEngine] = {}
        self._failed: dict[str, str] = {}

    def start(self, name: str, arguments: Callable[[], dict[str, Any]]) -> None:
        """Once per name. ``arguments`` is called here: a policy may lack what it needs."""
        if name in self._engines or name in self._failed:
            return
        wide = slow_in_16_bit()  # products would take ten times as long and hide all else
        common = {
            "dtype": "float32" if wide else "bfloat16",
            "block_size": BLOCK,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 1 << 29 if wide else 1 << 28,
            "skip_tokenizer_init": True,
            "preloaded": self.options.smoke,
        }
        with reported(self._failed, name):
            engine = KVEngine(self.model, **(common | arguments()))
            self._engines[name] = self._stack.enter_context(engine)
            started = engine.started | {"dtype": common["dtype"]}
            self.result.details.setdefault("cost_engines", {})[name] = started

    def samples(
        self, names: Sequence[str], method: str, title: str, **request: Any
    ) -> dict[str, list[Any]]:
        """What each of these engines answered, a value per round."""
        request |= {"seed": self.options.seed}

        def ask(name: str) -> Any:
            return self._engines[name].ask(method, **request)

        started = [name for name in names if name in self._engines]
        return alternate(started, self.options.rounds, ask, title)

    def median(
        self,
        key: str,
        samples: dict[str, list[Any]],
        of: Callable[[float, float], float],
        ours: str,
        base: str,
    ) -> None:
        """The median over rounds of ``of(ours, base)``, or why there is none."""
        if lacking := [name for name in (ours, base) if name in self._failed]:
            self.result.missing(key, self._failed[lacking[0]])
        else:
            pairs = zip(samples[ours], samples[base], strict=True)
            self.result.median(key, [of(a, b) for a, b in pairs])


def _keep100(turns: _Turns) -> None:
    smoke, seed = turns.options.smoke, turns.options.seed
    names = [KEEP100, STOCK]
    turns.start(KEEP100, lambda: policy("snap_kv", keep=1.0))
    turns.start(STOCK, lambda: {"plugin": False})
    if not smoke:
        names.append(DEFAULT)
        turns.start(DEFAULT, lambda: {"plugin": False, "block_size": None})
    draw = random.Random(seed)
    prompts, shortest, longest, tokens = (3, 20, 60, 4) if smoke else (16, 100, 900, 32)
    lengths = [draw.randint(shortest, longest) for _ in range(prompts)]
    turns.result.details["keep100_load"] = {"lengths": lengths, "tokens": tokens}
    runs = turns.samples(names, "run", "keep 1.0", lengths=lengths, tokens=tokens)
    speed = {name: [run["tokens_per_s"] for run in of_one] for name, of_one in runs.items()}
    turns.result.details["keep100_tokens_per_s"] = speed
    turns.median("keep100_throughput_ratio", speed, _ratio, KEEP100, STOCK)
    if not smoke:
        turns.median("keep100_vs_default_block_ratio", speed, _ratio, KEEP100, DEFAULT)


def _compaction(turns: _Turns) -> None:
    """The share of a prefill that is there at keep 0.25 and not at keep 1.0."""
    options, model = turns.options, turns.model
    more = ("snap_kv", "key_diff", "recent", "prefix_kv_all_queries")
    names = ["prefix_kv", *(() if options.smoke else more)]
    turns.start(KEEP100, lambda: policy("snap_kv", keep=1.0))
    for name in names:
        turns.start(name, partial(contender, name, KEEP, model, options))
    length = 200 if options.smoke else PREFILL
    speed = turns.samples([KEEP100, *names], "prefill", "prefill", tokens=length)
    turns.result.details["prefill_tokens_per_s"] = speed
    for name in names:
        key = "compaction_share_of_prefill" + ("" if name == "prefix_kv" else f"_{name}")
        # Of tokens per second: 1 - t(base) / t(ours).
        turns.median(key, speed, lambda ours, base: 1 - ours / base, name, KEEP100)


def _levels(turns: _Turns) -> None:
    """Groups of layers: what the builder takes for each, and what they cost a decode step."""
    options, model = turns.options, turns.model
    levels = 2 if options.smoke else 4  # the layers of --smoke's model
    one, several = "1 level", f"{levels} levels"

    def cut(count: int) -> dict[str, Any]:
        file = made_up_profile(model, KEEP, levels, options)
        return policy("snap_kv", profile=str(file), levels=count)

    turns.start(STOCK, lambda: {"plugin": False})
    turns.start(one, lambda: cut(1))
    turns.start(several, lambda: cut(levels))
    request = {"batch": 8, "prompt": 512, "tokens": 48}
    if options.smoke:
        request = {"batch": 2, "prompt": 160, "tokens": 6}
    turns.result.details["levels_load"] = request | {"levels": levels}
    speed = turns.samples((STOCK, one, several), "decode", "levels", **request)
    turns.result.details["levels_tokens_per_s"] = speed
    turns.median("levels4_throughput_ratio", speed, _ratio, several, one)
    spent = turns.samples((STOCK, one, several), "build_ms", "metadata builder", **request)
    turns.result.details["builder_ms"] = spent
    turns.median("builder_ms_per_group_step", spent, lambda ours, base: ours - base, several, STOCK)


def _ratio(ours: float, base: float) -> float:
    return ours / base
