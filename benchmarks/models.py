# SPDX-License-Identifier: Apache-2.0
"""Which models are served, and how right: a matrix over tiny random models of many families.

    .venv/bin/python -m benchmarks.models [--part matrix|folds] [--family NAME ...] [--json]
        [--lines FILE] [--out FILE] [--table docs/models.md]

matrix   For each family of benchmarks.architectures, engines with blocks of 32 tokens, on prompts
         of 7, 130 and 1,000 random tokens, 16 greedy tokens each:
         stock    vLLM without the plugin, float32: its log probabilities against transformers'
         kv       snap_kv at keep 0.25: a request that opts out (compress_keep 1) gets stock's
                  tokens, the others free blocks and answer as transformers does without the evicted
                  tokens (benchmarks.models_kv), and no block and no request is left behind
         weights  int4 by smoothquant_plus at load, rounded to nearest, every proved fold, groups of
                  32, bfloat16, the first two prompts: log probabilities against transformers' with
                  the weights that the plan stands for; the mean is below 0.06 nats a token, and
                  below half of the distance to the 16-bit model
         Doctor, plan and config edge are asked of each first. A cell is ok, refused (by the three
         of them alike), stock fails (ours is not asked then), or one of three that must not be:
         wrong, crash (an error that is no refusal), late (a refusal that not all give, or that
         comes when weights are read).
  families                   how many there are
  families_kv, families_int4 those with the cell ok
  families_refused_clearly   those with a refused cell, or two
  families_wrong             those with a cell that must not be
  fold_derivation_s_max      most CPU seconds that finding and proving the folds of one took
folds    fold_derivation_share   the same for the demo model, over the CPU seconds of its
                             calibration with default settings, sampling of its text included
                             Extra: fold_derivation_s

--family   only this one; may be repeated
--lines    file of finished families, one JSON line each; those that it has are not run again
--table    document whose table is written

Limits. Random weights say nothing about the quality of answers. Models of images and of sound are
asked about text alone, without their towers. One CPU, one thread.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import common, models_table
from benchmarks.architectures import FAMILIES, write_model
from benchmarks.common import Options, Part, Result, cache_folder, log
from benchmarks.engine import in_process
from benchmarks.models_cells import BAD
from benchmarks.models_family import measured, request_of
from vllm_plugin.demo_model import demo_model_path

MATRIX = (
    *("families", "families_kv", "families_int4", "families_refused_clearly", "families_wrong"),
    "fold_derivation_s_max",
)
SMOKE = ("gemma2", "deepseek v2")  # one that is served, and one that is refused


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--family", action="append", choices=list(FAMILIES))
    own.add_argument("--table", type=Path)
    given, _ = own.parse_known_args(arguments)
    parts = {
        "matrix": Part(MATRIX, partial(matrix, given.family, given.table)),
        "folds": Part(("fold_derivation_share",), folds),
    }
    return common.main(__doc__, parts, arguments, [own])


def matrix(chosen: list[str] | None, table: Path | None, options: Options, result: Result) -> None:
    """Fill the matrix."""
    _quiet_and_fast()
    names = chosen or (list(SMOKE) if options.smoke else list(FAMILIES))
    records, broken = _finished(result.lines), []
    for family in (bar := tqdm(names, desc="families", leave=False)):
        bar.set_postfix_str(family)
        if family not in records:
            begin = time.perf_counter()
            try:
                records[family] = measured(family) | {"wall_s": time.perf_counter() - begin}
            except Exception:
                traceback.print_exc()
                broken.append(family)
                continue
            result.note(family, records[family])
        told = "; ".join(f"{key} {value}" for key, value in records[family]["cells"].items())
        log.print(f"{family}: {told}", highlight=False, markup=False)
    if broken:
        raise RuntimeError(f"not measured: {', '.join(broken)}")
    asked = {name: records[name] for name in names}
    result.details |= asked
    states = [set(record["states"].values()) for record in asked.values()]
    result.put("families", len(asked))
    for key, column in (("families_kv", "kv"), ("families_int4", "weights")):
        result.put(key, sum(record["states"][column] == "ok" for record in asked.values()))
    result.put("families_refused_clearly", sum("refused" in found for found in states))
    result.put("families_wrong", sum(bool(found & set(BAD)) for found in states))
    seconds = [sum(record["folds"].values()) for record in asked.values() if record["folds"]]
    if seconds:
        result.put("fold_derivation_s_max", max(seconds))
    if table is not None:
        models_table.write(table, {name: record["cells"] for name, record in asked.items()})


def folds(options: Options, result: Result) -> None:
    """Fill fold_derivation_share."""
    _quiet_and_fast()
    from benchmarks import models_reference as reference

    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        cache = Path(scratch) / "cache"
        cache.mkdir()
        if options.smoke:
            model = in_process(
                *(write_model, "llama", Path(scratch) / "model", demo_model_path()), preloaded=True
            )
        else:
            model = demo_model_path()
        request = request_of({})
        whole = in_process(reference.calibration_seconds, model, request, cache)
        parts = in_process(reference.fold_seconds, model, request, cache)
    spent = sum(parts.values())
    result.put("fold_derivation_s", spent, **parts)
    result.put("fold_derivation_share", spent / whole, calibration_s=whole)


def _quiet_and_fast() -> None:
    """Set what processes inherit: vLLM's errors alone, one thread, no compiler for tiny models."""
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _finished(lines: Path | None) -> dict[str, dict[str, Any]]:
    """Return the records of families that an earlier run has written."""
    if lines is None or not lines.is_file():
        return {}
    read = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {line["note"]: line["value"] for line in read if line.get("note") in FAMILIES}


if __name__ == "__main__":
    sys.exit(main())
