# SPDX-License-Identifier: Apache-2.0
"""Whether served weights lose what judged weights lose: engines against the float32 judge.

A few windows, because an engine in bfloat16 is slow on some processors. What an engine loses is
paired with what a stock engine has with the 16-bit model, as the judge pairs its own.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Result
from benchmarks.engine import Engine, in_process
from benchmarks.weights_judge import Bench, Contender, windows
from benchmarks.weights_speed import TRUE_W4A16, no_amx, no_avx512

WINDOWS = 4
TOLERANCE = 0.03  # nats: what bfloat16 of an engine may add or take on so few windows
# Key -> what differs in its engine; all serve the checkpoint of nats_default.
SERVED: dict[str, dict[str, Any]] = {
    "nats_default_served": {
        "additional_config": {"compress": {"weights": {"activations": "bf16"}}}
    },
    "nats_default_int8": {},
    "nats_default_vllm_kernel": {"plugin": False, "env": TRUE_W4A16},
}


# Key -> says why this processor has no such engine.
NEEDS = {"nats_default_int8": no_amx, "nats_default_vllm_kernel": no_avx512}


def served(options: Options, bench: Bench, default: Contender, result: Result) -> None:
    """Fill nats_default_served and its like, after nats_default: judged on the same windows."""
    tokens = in_process(_tokens, bench, preloaded=options.smoke)[:WINDOWS]

    def engine(key: str, model: Path, arguments: dict[str, Any]) -> list[float]:
        shared = {"skip_tokenizer_init": True, "preloaded": options.smoke}
        with Engine(model, **shared | arguments) as running:
            result.note(f"quality_engine_{key}", running.started)
            return [statistics.fmean(nats) for nats in running.ask("nats", windows=tokens)]

    judged = statistics.fmean(result.details["nats_default"]["windows"][: len(tokens)])
    result.put("nats_default_judged", judged)
    base = engine("stock", bench.model, {"plugin": False})
    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
        written = Path(scratch) / "default"
        in_process(_write, default, bench, written, preloaded=options.smoke)
        for key, arguments in SERVED.items():
            if (needs := NEEDS.get(key)) and (why := needs()):
                result.missing(key, why)
                continue
            nats = engine(key, written, arguments)
            windows = [a - b for a, b in zip(nats, base, strict=True)]
            result.put(key, statistics.fmean(windows), windows=windows)
            if key == "nats_default_served":
                gap = abs(statistics.fmean(windows) - judged)
                result.put("nats_default_served_gap", gap, tolerance=TOLERANCE)


def _write(contender: Contender, bench: Bench, target: Path) -> None:
    """Write the checkpoint of a contender. Its plan is in the store already."""
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.plan_request import PlanRequest

    request = PlanRequest(
        method=contender.method, settings=contender.settings, calibration=contender.calibration
    )
    quantize_checkpoint(bench.model, target, request)


def _tokens(bench: Bench) -> list[list[int]]:
    from compress_common.checkpoints.checkpoint import Checkpoint

    return windows(Checkpoint(bench.model), bench)[0].tolist()
