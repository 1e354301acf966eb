# SPDX-License-Identifier: Apache-2.0
"""Judges weights: runs in child processes of ``benchmarks.weights_quality``.

The weights of a contender are dequantized into one ``transformers`` model in float32, so that all
are judged by the same arithmetic. Engines would add what their kernels round, and some processors
have no kernel for some contenders.
"""

import json
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.common import source
from benchmarks.peers import write_peer
from compress_common.calibration.precision import computed_in
from compress_common.calibration.text import CalibrationSettings, file_tokens
from compress_common.calibration.texts import stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.identity import tensor_digest
from compress_common.checkpoints.loading import load_model
from compress_common.progress import Progress, silent
from compress_common.store import digest
from quant_methods.allocators.allocation import read_allocation
from quant_methods.formats.sizes import bits_per_weight
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.search_request import SearchRequest
from quant_methods.searching import search
from vllm_plugin.progress import bar

_REVISION = 1  # raise it when the same weights would be judged differently than before


@dataclass(frozen=True)
class Contender:
    """Weights to judge: of a plan, of another tool, or those of the model itself.

    Attributes:
        method: Name of one of our methods, or of a peer.
        settings: Of our method.
        calibration: Of our method, as ``CalibrationSettings`` takes it.
        search: A ``SearchRequest`` whose allocation the plan takes; empty: none.
        peer: Whether another tool makes the weights.
    """

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    peer: bool = False


@dataclass(frozen=True)
class Bench:
    """What all contenders share.

    Attributes:
        model: Folder of the 16-bit checkpoint.
        folder: Where losses and allocations are kept. Plans are in the store.
        texts: Files that are judged on.
        windows: Of each text.
        length: Tokens of a window.
        calibration: The text that contenders are calibrated on unless they say otherwise.
    """

    model: Path
    folder: Path
    texts: tuple[Path, ...]
    windows: int
    length: int
    calibration: dict[str, Any]


def judge(contender: Contender, bench: Bench) -> dict[str, Any]:
    """Return what is known of a contender.

    ``nats`` is a list by text of the mean negative log-likelihood of each window. It is kept by the
    digest of the weights, so that an interrupted benchmark goes on after it.
    """
    checkpoint = Checkpoint(bench.model)
    with bar() as progress:
        network, record = _network(checkpoint, contender, bench, progress)
        texts = windows(checkpoint, bench)
        state = sorted(network.state_dict().items())
        parts = [tensor_digest(tensor) for _, tensor in (*state, *enumerate(texts))]
        kept = bench.folder / f"judged-{digest(f'revision {_REVISION}', *parts)[:16]}.json"
        if not kept.is_file():
            nats = losses(network, torch.cat(texts), progress)
            starts = range(0, len(nats), bench.windows)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps([nats[i : i + bench.windows] for i in starts]))
            os.replace(partial, kept)
    return record | {
        "nats": json.loads(kept.read_text()),
        "contender": asdict(contender),
        "commit": source(),
    }


def windows(checkpoint: Checkpoint, bench: Bench) -> list[torch.Tensor]:
    """Return windows spread evenly over each text, int64 [windows, length]."""
    return [
        file_tokens(
            CalibrationSettings(source=str(text), samples=bench.windows, length=bench.length),
            checkpoint.tokenizer,
        )
        for text in bench.texts
    ]


@torch.inference_mode()
def losses(network: Any, tokens: torch.Tensor, progress: Progress) -> list[float]:
    """Return the mean negative log-likelihood of the tokens of each window but its first."""
    found = []
    for done, window in enumerate(tokens.to(network.device), start=1):
        logits = network(window[None, :-1], use_cache=False).logits[0]
        found.append(cross_entropy(logits, window[1:]).item())
        progress("judge", done, len(tokens))
    return found


def _network(
    checkpoint: Checkpoint, contender: Contender, bench: Bench, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """Return the model with a contender's weights in float32, and what it cost to make them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if contender.peer:
        folder = write_peer(contender.method, bench.model, calibration_windows(bench, progress))
        record = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        return decompressed(folder).to(device), record
    config, record = deepcopy(checkpoint.hf_config), {}
    if not contender.method:
        state = dict(checkpoint.tensors())
    else:
        request, record = _request(checkpoint, contender, bench, device, progress)
        plan, _ = obtain_plan(checkpoint, request, device=device, progress=progress)
        record |= {"bits": bits_per_weight(plan.grids, config), "report": plan.report}
        config.update(plan.config)
        state = {}
        for name, value in plan.transform(checkpoint.tensors(), torch.bfloat16):
            if isinstance(value, QuantizedWeight):
                state[f"{name}.weight"] = value.dequantize()
            else:
                state[name] = value
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    network = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return network.eval().to(device), record


def _request(
    checkpoint: Checkpoint, contender: Contender, bench: Bench, device: str, progress: Progress
) -> tuple[PlanRequest, dict[str, Any]]:
    """Return how our weights are made, after the search if there is one, and its cost."""
    settings, record = dict(contender.settings), {}
    calibration = CalibrationSettings(**contender.calibration)
    if contender.search:
        wanted = SearchRequest(calibration=calibration, **contender.search)
        file = bench.folder / f"bits-{digest(wanted.model_dump_json())[:16]}.json"
        if not file.is_file():
            cpu = time.process_time()
            found = search(checkpoint, wanted, device=device, progress=progress)
            found.report["cpu_s"] = time.process_time() - cpu
            found.save(file)
        found = read_allocation(str(file))
        record = {"search_cpu_s": found.report["cpu_s"], "search": found.report}
        settings |= found.grid | {"allocation": str(file)}
    request = PlanRequest(method=contender.method, settings=settings, calibration=calibration)
    return request, record


def calibration_windows(bench: Bench, progress: Progress = silent) -> Path:
    """Return a JSON file of the calibration windows, for other tools."""
    checkpoint, settings = Checkpoint(bench.model), CalibrationSettings(**bench.calibration)
    dtype = computed_in(checkpoint.weight_bytes, "cpu")
    model = load_model(checkpoint, dtype)
    tokens = stored_tokens(checkpoint, settings, model, progress, dtype)
    file = bench.folder / f"calibration-{digest(settings.model_dump_json())[:16]}.json"
    file.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    return file


def decompressed(folder: Path) -> Any:
    """Return the model of a compressed-tensors checkpoint, its weights in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
