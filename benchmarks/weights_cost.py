# SPDX-License-Identifier: Apache-2.0
"""What quantizing costs: time beside llm-compressor's AWQ, and memory beside the model."""

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.common import Options, Result, alternate, cache_folder
from benchmarks.engine import in_process
from benchmarks.peers import PeersUnavailable, run_peer
from benchmarks.random_models import bench_model
from benchmarks.weights_judge import calibration_windows
from benchmarks.weights_quality import GROUP, bench
from compress_common.cache import cache_dir
from compress_common.calibration.precision import computed_in
from compress_common.calibration.text import CalibrationSettings
from compress_common.calibration.texts import KIND as TEXT_KIND
from compress_common.checkpoints.checkpoint import Checkpoint
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from vllm_plugin.demo_model import demo_model_path

# Of AWQ and ours, which take turns: AWQ takes minutes on some processors.
ROUNDS = 1
# Calibration of the memory's model. Its hidden states are small beside a model of this size.
TOKENS = {"samples": 16, "length": 128}


def cost(options: Options, result: Result) -> None:
    """Fill vs_awq_wall_ratio, vs_awq_cpu_ratio and calibration_peak_ratio."""
    _memory(options, result)
    shared = bench(options)
    if options.smoke:
        for key in ("vs_awq_wall_ratio", "vs_awq_cpu_ratio"):
            result.missing(key, "--smoke does not run the peers")
        return
    windows = in_process(calibration_windows, shared)

    def measure(name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            if name == "awq":
                run_peer("awq", shared.model, windows, Path(scratch) / "awq")
                return dict(json.loads((Path(scratch) / "awq" / "cost.json").read_text()))
            return in_process(_quantize, shared.model, Path(scratch), GROUP, shared.calibration)

    try:
        costs = alternate(("ours", "awq"), ROUNDS, measure, "wall time", warm_up=0)
    except PeersUnavailable as error:
        for key in ("vs_awq_wall_ratio", "vs_awq_cpu_ratio"):
            result.missing(key, str(error))
        return
    result.note("quantizing_costs", costs)
    for what in ("wall", "cpu"):
        ours, theirs = ([one[f"{what}_s"] for one in costs[name]] for name in ("ours", "awq"))
        result.ratio(f"vs_awq_{what}_ratio", ours, theirs)


def _memory(options: Options, result: Result) -> None:
    """Peak of a process that quantizes with default settings, over the bytes of the weights."""
    model = bench_model(options)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        size = 64 if options.smoke else 128
        tokens = {"samples": 4, "length": 32} if options.smoke else TOKENS
        folder = _with_tokenizer(model, Path(scratch) / "model")
        found = in_process(_quantize, folder, Path(scratch), size, tokens, preloaded=options.smoke)
    result.note("calibration_peak", found)
    for what in ("peak", "anonymous"):
        ratio = found[f"{what}_bytes"] / found["weight_bytes"]
        result.put(f"calibration_{what}_ratio", ratio)


def _with_tokenizer(model: Path, folder: Path) -> Path:
    """A folder of links to a model and to the demo model's tokenizer.

    Only its start token is used, whose id is below every vocabulary.
    """
    folder.mkdir()
    demo = demo_model_path()
    for file in (*model.iterdir(), *demo.glob("tokenizer*")):
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return folder


def _quantize(
    model: Path, scratch: Path, group_size: int, calibration: dict[str, int]
) -> dict[str, float]:
    """Quantize with default settings in this process, which is a new one, and tell what it took.

    Plans go to an empty store. Calibration text that is in the store is taken from there, so that
    its sampling is not in the time: other tools are given it too.
    """
    texts, store = cache_dir() / TEXT_KIND, scratch / "store"
    store.mkdir()
    if texts.is_dir():
        shutil.copytree(texts, store / TEXT_KIND)
    os.environ["VLLM_COMPRESS_CACHE"] = str(store)
    checkpoint, settings = Checkpoint(model), {"group_size": group_size}
    request = PlanRequest(settings=settings, calibration=CalibrationSettings(**calibration))
    wall, cpu = time.perf_counter(), time.process_time()
    with Anonymous() as peak:
        quantize_checkpoint(model, scratch / "quantized", request)
    dtype = computed_in(checkpoint.weight_bytes, "cpu")
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": _status("VmHWM"),
        "anonymous_bytes": peak.bytes,
        "weight_bytes": checkpoint.weight_bytes,
        "computed_bytes": checkpoint.weight_bytes * (2 if dtype == torch.float32 else 1),
    }


class Anonymous(threading.Thread):
    """The peak of this process's anonymous memory, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.bytes = max(self.bytes, _status("RssAnon"))

    def __enter__(self) -> "Anonymous":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def _status(key: str) -> int:
    """A size of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{key}:")[1].split()[0]) * 1024
