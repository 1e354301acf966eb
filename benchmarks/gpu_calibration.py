# SPDX-License-Identifier: Apache-2.0
"""Seconds to calibrate a random model of Llama-3.1-8B's shape, as an engine does at its start."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import Options, Result, cache_folder
from benchmarks.engine import in_process
from benchmarks.gpu_models import llama
from compress_common.calibration.placement import placed
from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan

_LAYERS, _SHARD = 32, 4 << 30  # bytes
_TINY = CalibrationSettings(samples=2, length=16)
_START = SimpleNamespace(bos_token_id=1, eos_token_id=2)  # all that sampling asks of a tokenizer


def calibration(options: Options, result: Result) -> None:
    """Fill calibration_s and calibration_hash_s: see the text of ``benchmarks.gpu``."""
    shape = llama(options, 2 if options.smoke else _LAYERS)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        tokens = _TINY if options.smoke else CalibrationSettings()
        found = in_process(_measure, shape, Path(scratch), tokens, preloaded=options.smoke)
    result.put("calibration_hash_s", found.pop("hash_s"))
    result.put("calibration_s", found.pop("seconds"), **found)


def _measure(shape: Path, scratch: Path, tokens: CalibrationSettings) -> dict[str, Any]:
    """Calibrate with an empty store, in a process of its own."""
    os.environ["VLLM_COMPRESS_CACHE"] = str(scratch / "store")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _save(shape, scratch / "model", device)
    checkpoint = Checkpoint(scratch / "model", load_tokenizer=lambda: _START)
    request, begun = PlanRequest(calibration=tokens), dict[str, float]()
    begin = time.perf_counter()
    assert checkpoint.digest
    hashed = time.perf_counter()
    kept = placed(device, request.sizes(checkpoint))
    obtain_plan(
        checkpoint,
        request,
        device=device,
        progress=lambda step, *_: begun.setdefault(step, time.perf_counter()),
    )
    ended = time.perf_counter()
    until = [*begun.values(), ended][1:]
    return {
        "hash_s": hashed - begin,
        "seconds": ended - hashed,
        "steps": {step: b - a for (step, a), b in zip(begun.items(), until, strict=True)},
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "model_on": str(kept.model),
        "states_on": str(kept.states),
    }


def _save(shape: Path, folder: Path, device: torch.device) -> None:
    """Write random weights that belong to a config."""
    config = AutoConfig.from_pretrained(shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for number, names in enumerate(_shards(model.state_dict())):
        shard = {}
        for name, size in names.items():
            made = torch.ones(size, dtype=torch.bfloat16, device=device)
            shard[name] = (made if made.dim() == 1 else made.normal_(std=0.02)).cpu()
        save_file(shard, folder / f"model-{number:03}.safetensors", metadata={"format": "pt"})


def _shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Size]]:
    """Cut tensors into runs of a few gigabytes: ``{name: size}``."""
    shard, size = dict[str, torch.Size](), 0
    for name, tensor in tensors.items():
        if size > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.shape
        size += 2 * tensor.numel()
    yield shard
