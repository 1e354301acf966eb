# SPDX-License-Identifier: Apache-2.0
"""Quality of int4 weights: how many nats per token each method loses against bf16.

Every contender starts from the same weights, sees the same calibration windows, uses groups of 64
and is judged on the same tokens, through vLLM itself. Calibration text is sampled by the model;
the evaluation text is Newton's Opticks, which comes with a package that vLLM requires.
"""

import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result, cache_folder
from benchmarks.engine import Engine, in_process
from benchmarks.models import TINY, random_llama
from benchmarks.peers import PeersUnavailable, write_peer
from benchmarks.texts import opticks
from benchmarks.weights_speed import TRUE_W4A16
from vllm_plugin.demo_model import demo_model_path

GROUP = 64
PEERS = {"nats_awq": "awq", "nats_gptq_sym": "gptq"}


@dataclass(frozen=True)
class Sizes:
    """Evaluation windows and their tokens, calibration windows and their tokens."""

    windows: int = 32
    length: int = 512
    samples: int = 64
    sample_length: int = 128


def quality(options: Options, result: Result) -> None:
    """Fill the nats_* keys: difference of the mean negative log-likelihood to bf16."""
    sizes = Sizes(2, 64, 4, 32) if options.smoke else Sizes()
    model = random_llama(TINY, options) if options.smoke else demo_model_path()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        folder = Path(scratch)  # plans too: one of an older version of the code must not be used
        text = folder / "opticks.txt"
        text.write_text(opticks()[1], encoding="utf-8")
        tokens = in_process(
            _tokens, model, text, sizes, options.seed, folder, preloaded=options.smoke
        )
        contenders = _contenders(model, folder, sizes, options, result)
        baseline: list[list[float]] = []
        for key, (served, arguments) in (bar := tqdm(contenders.items(), "quality", leave=False)):
            bar.set_postfix_str(key)
            arguments = {"skip_tokenizer_init": True, "preloaded": options.smoke} | arguments
            with Engine(served, **arguments) as engine:
                result.details[f"quality_engine_{key}"] = engine.started
                nats = engine.ask("nats", windows=tokens)
            if not baseline:
                baseline = nats
                result.put(key, statistics.fmean(statistics.fmean(window) for window in nats))
            else:
                _difference(result, key, nats, baseline)
        if "int8" not in str(result.details.get("quality_engine_nats_best_int8", "int8")):
            result.missing("nats_best_int8", "activations stay bf16 here: the CPU has no AMX")
        result.details["plans"] = in_process(_plans, folder / "plan", preloaded=options.smoke)


def _contenders(
    model: Path, folder: Path, sizes: Sizes, options: Options, result: Result
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Key -> (what is served, what differs in its Engine); bf16 first.

    All settings are fixed here, beforehand: alpha is chosen on the calibration windows, nothing on
    the evaluation text. The stock engine serves the peers, as it would serve their users.
    """
    calibration = {
        "source": str(folder / "calibration.txt"),
        "samples": sizes.samples,
        "length": sizes.sample_length,
    }
    search = "coarse" if options.smoke else "full"
    paper = {"folds": "norms", "clip": False, "search": search, "calibration": calibration}
    best = {"folds": "all", "rounding": "gptq", "calibration": calibration}

    def ours(method: str, **weights: Any) -> tuple[Path, dict[str, Any]]:
        section = {"group_size": GROUP, "activations": "bf16"} | weights
        return model, {
            "quantization": method,
            "additional_config": {"compress": {"weights": section}},
            "env": {"VLLM_COMPRESS_CACHE": str(folder)},
        }

    stock = {"plugin": False, "env": TRUE_W4A16}
    contenders = {
        "nats_bf16_absolute": (model, {"plugin": False}),
        "nats_paper": ours("smoothquant_plus", **paper),
        "nats_best": ours("smoothquant_plus", **best),
        "nats_rtn_asym": ours("rtn"),
    }
    if options.smoke:
        for key in PEERS:
            result.missing(key, "--smoke does not run the peers")
        return contenders
    contenders |= {
        "nats_default": ours("smoothquant_plus", calibration=calibration),
        "nats_rtn_gptq": ours("rtn", rounding="gptq", calibration=calibration),
        "nats_rtn_sym": ours("rtn", symmetric=True),
        "nats_best_int8": ours("smoothquant_plus", activations="auto", **best),
    }
    written = in_process(_write_best, model, folder, best)
    contenders["nats_best_vllm_kernel"] = written, stock
    for key, method in PEERS.items():
        try:
            peer = write_peer(method, model, folder / "windows.json")
        except PeersUnavailable as error:
            result.missing(key, str(error))
            continue
        contenders[key] = peer, stock
        result.details[f"{method}_cost"] = json.loads((peer / "cost.json").read_text())
    return contenders


def _difference(
    result: Result, key: str, nats: list[list[float]], baseline: list[list[float]]
) -> None:
    """Mean difference, and its standard error over windows: tokens of one are not independent."""
    windows = [
        statistics.fmean(a - b for a, b in zip(one, base, strict=True))
        for one, base in zip(nats, baseline, strict=True)
    ]
    result.put(key, statistics.fmean(windows), windows=windows)
    result.put(f"{key}_se", statistics.stdev(windows) / len(windows) ** 0.5)


def _tokens(model: Path, text: Path, sizes: Sizes, seed: int, folder: Path) -> list[list[int]]:
    """Evaluation windows; writes calibration.txt and windows.json, its windows, for the peers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quant_methods.calibration.text import SELF, CalibrationSettings, calibration_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    # Text is split into fewer tokens than it was sampled as, so sample more.
    settings = CalibrationSettings(
        source=SELF, samples=sizes.samples * 3 // 2, length=sizes.sample_length, seed=seed
    )
    sampled = calibration_tokens(settings, network, tokenizer)
    file = folder / "calibration.txt"
    file.write_text("\n\n".join(tokenizer.batch_decode(sampled, skip_special_tokens=True)))
    settings = CalibrationSettings(
        source=str(file), samples=sizes.samples, length=sizes.sample_length
    )
    windows = calibration_tokens(settings, network, tokenizer).tolist()
    (folder / "windows.json").write_text(json.dumps(windows))
    settings = CalibrationSettings(source=str(text), samples=sizes.windows, length=sizes.length)
    return calibration_tokens(settings, network, tokenizer).tolist()


def _write_best(model: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """The checkpoint of ``nats_best``, for vLLM's own kernel: the peers are served by it too."""
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.planning import PlanRequest

    os.environ["VLLM_COMPRESS_CACHE"] = str(folder)  # in a child process: the plan is shared
    calibration = settings["calibration"]
    own = {k: v for k, v in settings.items() if k != "calibration"} | {"group_size": GROUP}
    request = PlanRequest(settings=own, calibration=calibration)
    quantize_checkpoint(model, folder / "best", request)
    return folder / "best"


def _plans(folder: Path) -> list[dict[str, Any]]:
    from quant_methods.formats.plan_file import load_plan

    return [load_plan(path).report for path in sorted(folder.glob("*/*.safetensors"))]
