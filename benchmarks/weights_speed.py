# SPDX-License-Identifier: Apache-2.0
"""Speed of int4 weights: up to five engines of one random 1.1B Llama that take turns.

All serve the same weights, all but one from the same int4 checkpoint. Eager mode: compiling changes
the linears, which are what differs here, in no way.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Result, alternate, cache_folder, machine
from benchmarks.engine import Engine
from benchmarks.random_models import bench_model, write_rtn
from vllm_plugin.demo_model import demo_model_path

PROMPT, PREFILL = 32, 512
BATCHES = {1: 24, 8: 24, 32: 16}  # requests at once -> tokens each
STEPS = 10
STEP_KEYS = {batch: f"step_ratio_b{batch}" for batch in BATCHES}
TRUE_W4A16 = {"VLLM_CPU_INT4_W4A8": "0"}
BF16_ACTIVATIONS = {"compress": {"weights": {"activations": "bf16"}}}

# Contender -> (serves the int4 checkpoint, what differs in its Engine).
CONTENDERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "bf16": (False, {"plugin": False}),
    "ours": (True, {}),
    "ours, bf16 activations": (True, {"additional_config": BF16_ACTIVATIONS}),
    "vLLM W4A16": (True, {"plugin": False, "env": TRUE_W4A16}),
    "vLLM default": (True, {"plugin": False}),
}
# Suffix of extra keys -> (ours, theirs).
EXTRAS = {
    "vs_vllm_w4a16": ("ours", "vLLM W4A16"),
    "vs_vllm_default": ("ours", "vLLM default"),
    "bf16_activations_ratio": ("ours, bf16 activations", "bf16"),
    "bf16_activations_vs_vllm_w4a16": ("ours, bf16 activations", "vLLM W4A16"),
}


def speed(options: Options, result: Result) -> None:
    """Fill decode_ratio_*, prefill_ratio and the comparisons with vLLM's own int4 kernel."""
    left_out = {name: why for name, needs in NEEDS.items() if (why := needs())}
    names = [name for name in CONTENDERS if name not in left_out]
    with _engines(names, bench_model(options), options) as engines:
        started = {name: engine.started for name, engine in engines.items()}
        result.details["speed_engines"] = started
        for batch, tokens in BATCHES.items():
            if not _asked(options, f"decode_ratio_b{batch}"):
                continue
            request = {"batch": batch, "prompt": PROMPT, "tokens": tokens, "seed": options.seed}
            if options.smoke:
                request |= {"prompt": 8, "tokens": 4}
            samples = alternate(
                list(engines),
                options.rounds,
                partial(_ask, engines, "decode", request),
                f"decode, batch {batch}",
            )
            _record(result, f"b{batch}", f"decode_ratio_b{batch}", samples, left_out)
        if not _asked(options, "prefill_ratio"):
            return
        length = 64 if options.smoke else PREFILL
        samples = alternate(
            list(engines),
            options.rounds,
            partial(_ask, engines, "prefill", {"tokens": length, "seed": options.seed}),
            "prefill",
        )
        _record(result, "prefill", "prefill_ratio", samples, left_out)


def step(options: Options, result: Result) -> None:
    """Fill step_ratio_*: our decoding of the demo model over that of vLLM's same kernel."""
    if why := no_amx():
        for key in STEP_KEYS.values():
            result.missing(key, why)
        return
    model = bench_model(options) if options.smoke else demo_model_path()
    with _engines(["ours", "vLLM default"], model, options) as engines:
        for batch, key in STEP_KEYS.items():
            request = {"batch": batch, "prompt": 8, "tokens": STEPS, "seed": options.seed}
            samples = alternate(
                list(engines),
                options.rounds,
                partial(_ask, engines, "decode", request),
                f"decode steps, batch {batch}",
            )
            result.details[f"tokens_per_s_step_b{batch}"] = samples
            result.ratio(key, samples["ours"], samples["vLLM default"])


@contextmanager
def _engines(names: list[str], model: Path, options: Options) -> Iterator[dict[str, Engine]]:
    """Engines of some contenders, on one model and its int4 checkpoint."""
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=cache_folder()))
        int4 = write_rtn(model, Path(scratch) / "int4", options)
        engines = {}
        for name in names:
            quantized, arguments = CONTENDERS[name]
            served = int4 if quantized else model
            engines[name] = stack.enter_context(
                Engine(served, skip_tokenizer_init=True, preloaded=options.smoke, **arguments)
            )
            quantization = engines[name].started["quantization"]
            if name.startswith("ours") and quantization != "rtn":
                # The figures would be vLLM's own.
                raise RuntimeError(f"{name} is served as {quantization}, not rtn")
        yield engines


def no_amx() -> str | None:
    """Say why our activations are never int8 on this processor; None: they are."""
    has = "amx_int8" in machine()["cpu_features"]
    return None if has else "activations stay bf16 here: the CPU has no AMX"


def no_avx512() -> str | None:
    """Say why stock vLLM serves no int4 on this processor; None: it does."""
    has = "avx512f" in machine()["cpu_features"]
    return None if has else "vLLM's own int4 kernel needs AVX-512"


# Contender -> says why it is left out.
NEEDS = {
    "ours, bf16 activations": no_amx,  # else they are those of "ours"
    "vLLM W4A16": no_avx512,
    "vLLM default": no_avx512,
}


def _asked(options: Options, key: str) -> bool:
    return not options.rows or key.startswith(options.rows)


def _ask(engines: dict[str, Engine], method: str, request: dict[str, int], name: str) -> float:
    return engines[name].ask(method, **request)


def _record(
    result: Result,
    what: str,
    key: str,
    samples: dict[str, list[float]],
    left_out: dict[str, str],
) -> None:
    result.details[f"tokens_per_s_{what}"] = samples
    result.ratio(key, samples["ours"], samples["bf16"])
    for name, (ours, theirs) in EXTRAS.items():
        if why := left_out.get(ours) or left_out.get(theirs):
            result.missing(f"{name}_{what}", why)
        else:
            result.ratio(f"{name}_{what}", samples[ours], samples[theirs])
