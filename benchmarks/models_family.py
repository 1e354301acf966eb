# SPDX-License-Identifier: Apache-2.0
"""What engines and transformers make of one tiny model: a row of ``benchmarks.models``."""

import random
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.architectures import FAMILIES, TEXT, write_model
from benchmarks.common import cache_folder
from benchmarks.engine import ENGINE_ARGS, Engine, EngineFailed, in_process
from benchmarks.models_cells import FAILED, Cell, kv_cell, stock_cell, weights_cell
from benchmarks.models_kv import Kept
from vllm_plugin.demo_model import demo_model_path

T = TypeVar("T")
LENGTHS, TOKENS = (7, 130, 1000), 16
KEEP = Fraction(1, 4)
METHOD = "smoothquant_plus"
SETTINGS: dict[str, Any] = {"group_size": 32, "folds": "all", "alpha": 0.5}
SETTINGS |= {"rounding": "nearest", "clip": False, "calibration": {"samples": 2, "length": 16}}
KV: dict[str, Any] = {
    "additional_config": {"compress": {"kv": {"policy": "snap_kv", "keep": float(KEEP)}}}
}
WEIGHTS: dict[str, Any] = {
    "quantization": METHOD,
    "additional_config": {"compress": {"weights": SETTINGS | {"activations": "bf16"}}},
}
BASE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "block_size": 32,
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 28,
}
SIXTEEN = {"dtype": "bfloat16"}
# Of state-space layers: other batches give other tokens in bfloat16, and blocks are large.
ALONE = SIXTEEN | {"max_num_seqs": 1, "max_num_batched_tokens": 1024}


class FamilyEngine(Engine):
    """An engine of a tiny model."""

    child = "benchmarks.models_child:FamilyChild"


def measured(family: str) -> dict[str, Any]:
    """Return the cells of a family, and what they were judged by."""
    kind = FAMILIES[family]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        model = _run(write_model, family, Path(scratch) / "model", demo_model_path())
        base = ENGINE_ARGS | BASE | (ALONE if kind.sixteen else {})
        if kind.encoder is not None:
            base |= {"language_model_only": True}
        said = {
            name: _run(_asked, model, kind.architecture, base | more)
            for name, more in (("kv", KV), ("weights", SIXTEEN | WEIGHTS))
        }
        accepted = any(None in answers.values() for answers in said.values())
        stock = _stock(model, kind.architecture, base) if accepted else {}
        kv = _kv(model, kind.architecture, base) if _served(said["kv"], stock) else {}
        weights, spent = {}, {}
        if _served(said["weights"], stock):
            weights = _weights(model, kind.architecture, base | SIXTEEN, Path(scratch))
            spent = weights.pop("folds", {})
    cells: dict[str, Cell] = {
        "stock": stock_cell(stock, kind.sixteen),
        "kv": kv_cell(said["kv"], stock, kv, kind.sixteen),
        "weights": weights_cell(said["weights"], stock, weights),
    }
    return {
        "states": {key: cell.state for key, cell in cells.items()},
        "cells": {key: str(cell) for key, cell in cells.items()},
        "folds": spent,
        "said": said,
        "stock": stock,
        "snap_kv": kv,
        "int4": weights,
    }


def _served(said: dict[str, str | None], stock: dict[str, Any]) -> bool:
    return bool(stock) and FAILED not in stock and all(answer is None for answer in said.values())


def _asked(model: Path, architecture: str, engine: dict[str, Any]) -> dict[str, str | None]:
    from benchmarks.answers import answers

    return answers(model, architecture, engine)[0]


def _prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, TEXT["vocab_size"]) for _ in range(n)] for n in LENGTHS[:count]]


def _stock(model: Path, architecture: str, base: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import models_reference as reference

    prompts = _prompts(len(LENGTHS))
    ask: dict[str, Any] = {"prompts": prompts, "tokens": TOKENS, "keep": None, "of_prompt": True}
    try:
        with FamilyEngine(model, plugin=False, preloaded=True, **base) as engine:
            answer = engine.ask("answer", **ask)
    except EngineFailed as error:
        return {FAILED: _last_error(str(error))}
    pairs = list(zip(prompts, answer["tokens"], strict=True))
    return answer | {"judged": _run(reference.judged, model, architecture, pairs, True)}


def _kv(model: Path, architecture: str, base: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import models_reference as reference

    prompts = _prompts(len(LENGTHS))
    ask: dict[str, Any] = {"prompts": prompts, "tokens": TOKENS, "of_prompt": False}
    try:
        with FamilyEngine(model, preloaded=True, **base | KV) as engine:
            answers = {
                name: engine.ask("answer", keep=keep, **ask)
                for name, keep in (("whole", 1), ("quarter", None))
            }
            kept = Kept(KEEP, engine.ask("compressed_block"))
    except EngineFailed as error:
        return {FAILED: _last_error(str(error))}
    pairs = list(zip(prompts, answers["quarter"]["tokens"], strict=True))
    judged = {
        name: _run(reference.judged, model, architecture, pairs, False, some)["nats"]
        for name, some in (("chosen", kept), ("plain", None))
    }
    return answers | judged


def _weights(model: Path, architecture: str, base: dict[str, Any], scratch: Path) -> dict[str, Any]:
    from benchmarks import models_reference as reference

    prompts, cache, request = _prompts(2), scratch / "cache", request_of(SETTINGS)
    cache.mkdir()
    environment = {"VLLM_COMPRESS_CACHE": str(cache)}
    ask: dict[str, Any] = {"prompts": prompts, "tokens": TOKENS, "keep": None, "of_prompt": True}
    try:
        with FamilyEngine(model, env=environment, preloaded=True, **base | WEIGHTS) as engine:
            answer = engine.ask("answer", **ask)
    except EngineFailed as error:
        return {FAILED: _last_error(str(error))}
    pairs = list(zip(prompts, answer["tokens"], strict=True))
    rounded = _run(reference.write_rounded, model, scratch / "rounded", request, cache)
    spent = _run(reference.fold_seconds, model, request, cache)
    judged = {
        name: _run(reference.judged, folder, architecture, pairs, True)["nats"]
        for name, folder in (("rounded", rounded), ("plain", model))
    }
    return answer | judged | {"folds": spent}


def _run(function: Callable[..., T], *arguments: Any) -> T:
    return in_process(function, *arguments, preloaded=True)


def request_of(settings: dict[str, Any]) -> Any:
    from vllm_plugin.settings import WeightSettings

    return WeightSettings(**settings).request(METHOD, tensor_parallel=1)


def _last_error(log: str) -> str:
    """Return the last line of a log that names an error, with what follows it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [at for at, line in enumerate(lines) if "Error" in line.partition(":")[0]]
    if not named:
        return "the process died without an error of Python"
    return " ".join(lines[named[-1] :])
