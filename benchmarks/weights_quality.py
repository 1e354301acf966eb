# SPDX-License-Identifier: Apache-2.0
"""Quality of quantized weights: how many nats per token each method loses against 16 bits.

Every contender starts from the same weights, uses groups of 64 and is judged on the same tokens of
two texts that come with what vLLM requires: Newton's Opticks and Python's language reference.
Calibration text is sampled by the model. A finished contender is kept in the cache, so that an
interrupted run goes on with the next.
"""

import statistics
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result, cache_folder
from benchmarks.engine import in_process
from benchmarks.peers import PeersUnavailable
from benchmarks.random_models import TINY, random_llama
from benchmarks.texts import opticks
from benchmarks.weights_judge import Bench, Contender, judge
from benchmarks.weights_served import served
from quant_methods.methods.smoothquant_plus import PAPER
from vllm_plugin.commands.judging.texts import reference
from vllm_plugin.demo_model import demo_model_path

GROUP = 64
TEXTS = ("", "second_text_")  # prefixes of the keys
BASELINE = "nats_bf16_absolute"
PEERS = {
    "nats_awq": "awq",
    "nats_gptq_sym": "gptq",
    "nats_autoround": "autoround",
    "nats_autoround_light": "autoround_light",
}
# Bits per weight of codes alone -> the budget, which counts 16-bit scales and zero points too.
BUDGETS = {bits: bits + (16 + bits) / GROUP for bits in (3.5, 4.5)}
# Few generations, each of few candidates: a candidate is a pass of the model. The last stage has
# all of the search's text: 1,024 tokens were noisier than what a swap of bits brings.
EVOPRESS = {"generations": 8, "offspring": 8, "survivors": [2, 1], "tokens": [256, 4096]}


def quality(options: Options, result: Result) -> None:
    """Fill the nats_* keys: difference of the mean negative log-likelihood to 16 bits."""
    shared = bench(options)
    baseline: list[list[float]] = []
    chosen = contenders(options, shared)
    for key, contender in (bar := tqdm(chosen.items(), "quality", leave=False)):
        bar.set_postfix_str(key)
        try:
            record = in_process(judge, contender, shared, preloaded=options.smoke)
        except PeersUnavailable as error:
            for prefix in TEXTS:
                result.missing(prefix + key, str(error))
            continue
        result.note(f"record_{key}", {k: v for k, v in record.items() if k != "nats"})
        if not baseline:
            baseline = record["nats"]
            for prefix, nats in zip(TEXTS, baseline, strict=True):
                result.put(prefix + key, statistics.fmean(nats))
            continue
        for prefix, nats, base in zip(TEXTS, record["nats"], baseline, strict=True):
            difference(result, prefix + key, nats, base)
        for what in ("bits", "search_cpu_s"):
            if what in record:
                result.put(f"{key}_{what}", record[what])
    for key in PEERS.keys() - chosen.keys():
        for prefix in TEXTS:
            result.missing(prefix + key, "--smoke does not run the peers")
    served(options, shared, chosen["nats_default"], result)


def difference(result: Result, key: str, nats: list[float], base: list[float]) -> None:
    """Mean difference, and its standard error over windows: tokens of one are not independent."""
    windows = [a - b for a, b in zip(nats, base, strict=True)]
    result.put(key, statistics.fmean(windows), windows=windows)
    result.put(f"{key}_se", statistics.stdev(windows) / len(windows) ** 0.5)


def bench(options: Options) -> Bench:
    """What all contenders share, with its files written."""
    folder = cache_folder() / ("weights-smoke" if options.smoke else "weights")
    folder.mkdir(exist_ok=True)
    texts = []
    for name, text in (("opticks", opticks()[1]), ("reference", reference())):
        texts.append(folder / f"{name}.txt")
        texts[-1].write_text(text, encoding="utf-8")
    samples, length = (4, 32) if options.smoke else (64, 128)
    return Bench(
        random_llama(TINY, options) if options.smoke else demo_model_path(),
        folder,
        tuple(texts),
        *((2, 64) if options.smoke else (32, 512)),
        {"samples": samples, "length": length, "seed": options.seed},
    )


def contenders(options: Options, shared: Bench) -> dict[str, Contender]:
    """Key -> what is judged, the most wanted first.

    All settings are fixed here, beforehand; nothing is chosen on the evaluation texts.
    """
    calibration = shared.calibration

    def ours(method: str = "smoothquant_plus", **settings: Any) -> Contender:
        return Contender(method, {"group_size": GROUP} | settings, calibration)

    def allocated(method: str, budget: float, **settings: Any) -> Contender:
        wanted = {
            "method": method,
            "settings": settings,
            "budget": budget,
            "target": "humming",
            "levels": (3, 4, 5) if options.smoke else (2, 3, 4, 5, 6),
            "group_size": GROUP,
            "search_samples": 12 if options.smoke else 32,
        }
        return Contender("rtn", {"group_size": GROUP} | gptq, calibration, wanted)

    evopress = EVOPRESS
    if options.smoke:
        evopress = {"generations": 2, "offspring": 3, "survivors": [2, 1], "tokens": [32, 64]}
    gptq = {"rounding": "gptq"}
    paper = PAPER | ({"search": "coarse"} if options.smoke else {})
    found = {
        BASELINE: Contender(),
        "nats_default": ours(),
        "nats_at_load": Contender("smoothquant_plus", {"group_size": GROUP}),
        "nats_best": ours(),
        "nats_rtn_asym": ours("rtn"),
        "nats_3bit_uniform": ours("rtn", bits=3, **gptq),
        "nats_35bit_probe": allocated("probe", BUDGETS[3.5]),
        "nats_45bit_probe": allocated("probe", BUDGETS[4.5]),
        "nats_paper": ours(**paper),
        "nats_35bit_evopress": allocated("evopress", BUDGETS[3.5], **evopress),
    }
    if options.smoke:
        return found
    return (
        found
        | {key: Contender(method, peer=True) for key, method in PEERS.items()}
        | {
            "nats_rtn_sym": ours("rtn", symmetric=True),
            "nats_rsq": ours("rsq"),
            "nats_rsq_3bit": ours("rsq", bits=3),
            "nats_rsq_3bit_paper": ours(
                "rsq",
                bits=3,
                symmetric=True,
                rotation="both",
                power=2,
                expansion=8,
                least_weight=0.01,
                order="stored",
                steps="unit",
            ),
            "nats_35bit_baq": allocated("baq", BUDGETS[3.5]),
            "nats_35bit_luq": allocated("luq", BUDGETS[3.5]),
            "nats_35bit_hessian": allocated("hessian", BUDGETS[3.5]),
            "nats_35bit_hessian_pairwise": allocated("hessian", BUDGETS[3.5], pairwise=True),
        }
    )
