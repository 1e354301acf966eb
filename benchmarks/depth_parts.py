# SPDX-License-Identifier: Apache-2.0
"""The parts of ``benchmarks.depth``."""

import os
import statistics
import tempfile
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Result, alternate, cache_folder
from benchmarks.depth_runs import (
    answers_of,
    healed,
    nats_of,
    pruned,
    report_of,
    served_with_latents,
    unhealed,
)
from benchmarks.engine import Engine, in_process
from benchmarks.random_models import TINY, random_llama
from benchmarks.texts import opticks
from benchmarks.weights_judge import Bench, Contender, judge
from benchmarks.weights_quality import GROUP, difference
from compress_common.calibration.precision import slow_in_16_bit
from depth_pruning.request import PARTS
from vllm_plugin.demo_model import demo_model_path

_DEEP = {"num_hidden_layers": 16}
_KEYS = ("arithmetic", "recall")
_SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "single_drop",
        "block_influence",
        "macro_influence",
        "window",
        "greedy",
        "evopress",
    )
} | {
    "evopress_40": ("evopress", {"generations": 40, "patience": 20}),
    "evopress_greedy": ("evopress", {"start": "greedy"}),
}


def _model(options: Options) -> Path:
    if not options.smoke:
        return demo_model_path()
    return random_llama(type(TINY)(**vars(TINY) | _DEEP), options)


def _request(options: Options, **changes: Any) -> dict[str, Any]:
    samples, length = (8, 32) if options.smoke else (96, 128)
    calibration = {"samples": samples, "length": length, "seed": options.seed}
    if options.smoke and changes.get("search", "auto") == "auto":
        changes |= {"search_settings": {"text_tokens": 32, "generations": 1, "offspring": 2}}
    return {"calibration": calibration, "force": True} | changes


def _bench(options: Options, model: Path) -> Bench:
    folder = cache_folder() / ("depth-smoke" if options.smoke else "depth")
    folder.mkdir(exist_ok=True)
    text = folder / "opticks.txt"
    text.write_text(opticks()[1], encoding="utf-8")
    calibration = {"samples": 8, "length": 32} if options.smoke else {"samples": 64, "length": 128}
    return Bench(model, folder, (text,), *((2, 64) if options.smoke else (16, 512)), calibration)


@cache
def _full_nats(options: Options) -> list[float]:
    """Return the nats of the full model on a book, which all parts compare with."""
    model = _model(options)
    return in_process(nats_of, model, _bench(options, model), preloaded=options.smoke)


def _nats(options: Options, result: Result, key: str, folder: Path) -> None:
    """Fill a key with the nats that a pruned model loses on a book."""
    bench = _bench(options, _model(options))
    ours = in_process(nats_of, folder, bench, preloaded=options.smoke)
    difference(result, key, ours, _full_nats(options))


def _pruned(options: Options, result: Result, note: str, **request: Any) -> Path:
    """Return the folder of a pruned model, and note its report."""
    asked = _request(options, **request)
    folder = in_process(pruned, _model(options), asked, preloaded=options.smoke)
    result.note(f"report_{note}", report_of(folder))
    return folder


def _heal_ratio(result: Result, key: str, folder: Path) -> None:
    """Fill a key with what healing leaves of a pruned model's KL."""
    report = report_of(folder)
    result.put(key, report["loss"]["kl"] / report["loss_without_healing"]["kl"], **report["loss"])


def _healed(
    options: Options, dropped: tuple[int, ...], samples: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Return what each healer leaves of one set, by name, on some of the text."""
    request = _request(options)
    if samples:
        request["calibration"]["samples"] = samples
    return in_process(healed, _model(options), request, dropped, settings, preloaded=options.smoke)


def drop4(options: Options, result: Result) -> None:
    """Fill nats_drop4 and heal_kl_ratio_drop4."""
    folder = _pruned(options, result, "drop4", drop=4)
    _heal_ratio(result, "heal_kl_ratio_drop4", folder)
    _nats(options, result, "nats_drop4", folder)


def drop8(options: Options, result: Result) -> None:
    """Fill nats_drop8 and auto_vs_cosine_window_drop8."""
    auto = _pruned(options, result, "drop8", drop=8)
    _nats(options, result, "nats_drop8", auto)
    window = _pruned(options, result, "drop8_window", drop=8, search="window")
    losses: dict[str, list[float]] = {"": [], "_unhealed": [], "_linear": []}
    for report in (report_of(auto), report_of(window)):
        losses[""].append(report["loss"]["kl"])
        losses["_unhealed"].append(report["loss_without_healing"]["kl"])
        linear = _healed(options, tuple(report["dropped"]), linear={})["linear"]
        losses["_linear"].append(linear["kl"])
    for suffix, (ours, theirs) in losses.items():
        key = f"auto_vs_cosine_window_drop8{suffix}"
        result.put(key, ours / theirs, kl=[ours, theirs])


def _own_text(options: Options) -> dict[str, Any]:
    """Return the calibration on the other half of the book that models are judged by."""
    with tempfile.TemporaryDirectory() as scratch:
        text = cache_folder() / "opticks-first-half.txt"
        partial_file = Path(scratch) / "text.txt"
        partial_file.write_text(opticks()[0], encoding="utf-8")
        os.replace(partial_file, text)
    asked = _request(options)["calibration"]
    return {"source": str(text), "samples": asked["samples"], "length": asked["length"]}


def traffic4(options: Options, result: Result) -> None:
    """Fill nats_drop4_own_text and nats_drop4_int4_own_text."""
    own = _own_text(options)
    folder = _pruned(options, result, "own_text", drop=4, calibration=own)
    _heal_ratio(result, "heal_kl_ratio_drop4_own_text", folder)
    _nats(options, result, "nats_drop4_own_text", folder)
    _int4(options, result, "nats_drop4_int4_own_text", folder, own)


def traffic8(options: Options, result: Result) -> None:
    """Fill nats_drop8_own_text."""
    folder = _pruned(options, result, "own_text8", drop=8, calibration=_own_text(options))
    _nats(options, result, "nats_drop8_own_text", folder)


def text4(options: Options, result: Result) -> None:
    """Fill nats_drop4_more_text and nats_drop4_int4_more_text."""
    folder = _on_more_text(options, result, 4)
    _heal_ratio(result, "heal_kl_ratio_drop4_more_text", folder)
    _nats(options, result, "nats_drop4_more_text", folder)
    _int4(options, result, "nats_drop4_int4_more_text", folder)


def text8(options: Options, result: Result) -> None:
    """Fill nats_drop8_more_text."""
    _nats(options, result, "nats_drop8_more_text", _on_more_text(options, result, 8))


def _on_more_text(options: Options, result: Result, count: int) -> Path:
    """Return the model without the set that auto takes, healed on four times the text."""
    dropped = report_of(_pruned(options, result, f"drop{count}", drop=count))["dropped"]
    asked = _request(options)["calibration"]
    calibration = asked | {"samples": 4 * asked["samples"]}
    return _pruned(options, result, f"more_text{count}", layers=dropped, calibration=calibration)


def search(options: Options, result: Result) -> None:
    """Fill evopress_vs_greedy_kl, and the KL of each search's set of four as extra keys."""
    asked = {name: row for name, row in _SEARCHES.items() if name in (options.rows or _SEARCHES)}
    found = in_process(
        unhealed, _model(options), _request(options), 4, asked, preloaded=options.smoke
    )
    result.note("searches", found)
    for name, row in found.items():
        result.put(f"kl_unhealed_{name}", row["kl"], **row)
    if {"evopress", "greedy"} <= set(found):
        result.put("evopress_vs_greedy_kl", found["evopress"]["kl"] / found["greedy"]["kl"])
    else:
        result.missing("evopress_vs_greedy_kl", "it was not asked for (--row)")


def heal(options: Options, result: Result) -> None:
    """Fill heal_cpu_s and fusegpt_vs_refit_equal_cpu, on one window of four blocks."""
    dropped = (6, 7, 8, 9) if options.smoke else (12, 13, 14, 15)
    steps = {"steps": 2} if options.smoke else {"steps": 40}
    settings = {"none": {}, "linear": {}, "refit": {}, "fusegpt": steps}
    found = _healed(options, dropped, **settings)
    result.note("healers", found)
    for name, row in found.items():
        result.put(f"kl_heal_{name}", row["kl"], **row)
    result.put("heal_cpu_s", found["refit"]["cpu_s"])
    third = max(_request(options)["calibration"]["samples"] // 3, PARTS)
    less = _healed(options, dropped, third, none={}, refit={})
    result.note("healers_third", less)
    result.put("heal_cpu_s_third", less["refit"]["cpu_s"])
    for key, row in (("heal_kl_ratio", found), ("heal_kl_ratio_third", less)):
        result.put(key, row["refit"]["kl"] / row["none"]["kl"])
    ratio, cpu = (found["fusegpt"][what] / found["refit"][what] for what in ("kl", "cpu_s"))
    result.put("fusegpt_vs_refit_equal_cpu", ratio, cpu_ratio=cpu)


def serve(options: Options, result: Result) -> None:
    """Fill decode_ratio_drop4_b1, from two stock engines that take turns."""
    models = {"full": _model(options), "drop4": _pruned(options, result, "drop4", drop=4)}
    dtype = "float32" if slow_in_16_bit() else "bfloat16"
    request = {"batch": 1, "prompt": 32, "tokens": 48, "seed": options.seed}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                Engine(folder, plugin=False, preloaded=options.smoke, dtype=dtype)
            )
            for name, folder in models.items()
        }
        samples = alternate(
            list(engines),
            options.rounds,
            lambda name: engines[name].ask("decode", **request),
            "decode",
        )
    result.ratio("decode_ratio_drop4_b1", samples["drop4"], samples["full"])


def int4(options: Options, result: Result) -> None:
    """Fill nats_drop4_int4, and nats_int4 of the full model beside it."""
    folder = _pruned(options, result, "drop4", drop=4)
    for key, source in (("nats_drop4_int4", folder), ("nats_int4", _model(options))):
        _int4(options, result, key, source)


def _int4(
    options: Options,
    result: Result,
    key: str,
    folder: Path,
    calibration: dict[str, Any] | None = None,
) -> None:
    """Fill a key with the nats that a model in int4 loses against the full one in 16 bits."""
    bench = _bench(options, folder)
    contender = Contender(
        "smoothquant_plus", {"group_size": GROUP}, calibration or bench.calibration
    )
    record = in_process(judge, contender, bench, preloaded=options.smoke)
    difference(result, key, record["nats"][0], _full_nats(options))


def cskv(options: Options, result: Result) -> None:
    """Fill nats_drop4_cskv, from engines."""
    folder = _pruned(options, result, "drop4", drop=4)
    text = _bench(options, _model(options)).texts[0]
    row = in_process(served_with_latents, folder, text, options.smoke, preloaded=options.smoke)
    error = row.pop("standard_error")
    result.put("nats_drop4_cskv", row.pop("nats_difference"), standard_error=error, **row)


def answers(options: Options, result: Result) -> None:
    """Fill exact_answers_ratio_drop4: mean over kinds of exact answers, pruned over full."""
    folder = _pruned(options, result, "drop4", drop=4)
    count = 4 if options.smoke else 40
    run = partial(in_process, answers_of, preloaded=options.smoke)
    full, less = (run(model, options.seed, count) for model in (_model(options), folder))
    result.note("answers", {"full": full, "drop4": less})
    shares = {key: (statistics.fmean(full[key]), statistics.fmean(less[key])) for key in _KEYS}
    for key, (before, after) in shares.items():
        result.put(f"exact_{key}_full", before)
        result.put(f"exact_{key}_drop4", after)
    known = [after / before for before, after in shares.values() if before]
    if known:
        result.put("exact_answers_ratio_drop4", statistics.fmean(known), shares=shares)
    else:
        result.missing("exact_answers_ratio_drop4", "the full model answers none of them")
