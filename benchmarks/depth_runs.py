# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.depth`` does in child processes: prune, judge, heal, answer."""

import json
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import cache_folder, source
from benchmarks.depth_answers import exact_answers
from benchmarks.kv_engine import bases
from benchmarks.weights_judge import Bench, losses, windows
from compress_common.calibration.placement import ON_HOST
from compress_common.calibration.precision import computed_in
from compress_common.calibration.stages import Stages
from compress_common.calibration.texts import stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import calibration_blocks, load_model
from compress_common.store import digest
from depth_pruning.finding import Pruning
from depth_pruning.pruning import prune_checkpoint
from depth_pruning.request import PruneRequest
from depth_pruning.searches.registry import build_search
from vllm_plugin.commands.calibrate_kv import BITS, LENGTH, RATIOS, SAMPLES
from vllm_plugin.commands.judging.material import Sizes
from vllm_plugin.commands.kv_evaluation import evaluate_kv
from vllm_plugin.progress import bar


def pruned(model: Path, request: dict[str, Any]) -> Path:
    """Return the folder of a pruned model, from the cache if this commit has made it already."""
    wanted = PruneRequest(**request)
    key = digest(str(model), wanted.model_dump_json(), str(source()))[:16]
    folder = cache_folder() / f"depth-{key}"
    if not folder.is_dir():
        begin = time.process_time()
        with bar() as progress:
            prune_checkpoint(model, folder, wanted, progress=progress)
        cost = {"cpu_s": time.process_time() - begin}
        (folder / "cost.json").write_text(json.dumps(cost), encoding="utf-8")
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    """Return the report of a pruned model, with what making it cost."""
    cost = folder / "cost.json"
    found = json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}
    return json.loads((folder / "report.json").read_text(encoding="utf-8")) | found


def nats_of(folder: Path, bench: Bench) -> list[float]:
    """Return the mean negative log-likelihood of each window of a book, in float32."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = torch.cat(windows(Checkpoint(bench.model), bench))
    with bar() as progress:
        return losses(network, texts, progress)


def answers_of(folder: Path, seed: int, count: int) -> dict[str, list[bool]]:
    """Return which questions a model answers exactly, by kind."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return exact_answers(network, Checkpoint(folder).tokenizer, seed, count)


def served_with_latents(folder: Path, text: Path, small: bool) -> dict[str, Any]:
    """Return what cskv loses on a model, as ``vllm-compress eval-kv`` measures it.

    Args:
        folder: Of the model.
        text: That it is judged on.
        small: Whether only to see that it runs.
    """
    samples, length = (4, 64) if small else (SAMPLES, LENGTH)
    size = ("--samples", str(samples), "--length", str(length))
    kv = {"policy": "cskv", "bases": str(bases(folder, Fraction(RATIOS[BITS]), BITS, *size))}
    sizes = Sizes(256, 2, 1) if small else Sizes(512, 12, 4)
    _, ours = evaluate_kv(str(folder), [kv], text, sizes)
    return asdict(ours)


def unhealed(
    model: Path, request: dict[str, Any], count: int, searches: dict[str, Any]
) -> dict[str, Any]:
    """Return the set and the KL on held-out text that each search finds, without healing.

    Args:
        model: Folder.
        request: As ``PruneRequest`` takes it, without what names the search.
        count: Blocks that go.
        searches: By row, name and settings of each.
    """
    found: dict[str, Any] = {}
    with bar() as progress:
        shared = request | {"drop": count, "search": "greedy", "search_settings": {}}
        shared["heal"] = "none"
        work = _pruning(model, PruneRequest(**shared), progress)
        for row, (name, settings) in searches.items():
            begin = time.process_time()
            dropped = build_search(name, settings).choose(count, work.ground, progress)
            cpu = time.process_time() - begin
            loss = work.loss(dropped).rounded()
            found[row] = {"dropped": list(dropped), "cpu_s": cpu, **loss}
    return found


def healed(
    model: Path, request: dict[str, Any], dropped: tuple[int, ...], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the loss on held-out text, and the CPU seconds, of each healer on one set.

    Args:
        model: Folder.
        request: As ``PruneRequest`` takes it, without what names blocks and healer.
        dropped: The set.
        settings: Of each healer, by its name.
    """
    found: dict[str, Any] = {}
    with bar() as progress:
        for name, own in settings.items():
            asked = {"layers": dropped, "heal": name, "heal_settings": own, "force": True}
            work = _pruning(model, PruneRequest(**request | asked), progress)
            begin = time.process_time()
            work.healed(dropped)
            cpu = time.process_time() - begin
            found[name] = {"cpu_s": cpu, **work.loss(dropped).rounded()}
    return found


def _pruning(model: Path, request: PruneRequest, progress: Any) -> Pruning:
    """Return the work on a model, which keeps nothing."""
    checkpoint = Checkpoint(model)
    dtype = computed_in(checkpoint.weight_bytes, "cpu")
    network = load_model(checkpoint, dtype)
    tokens = stored_tokens(checkpoint, request.calibration, network, progress, dtype)
    blocks = calibration_blocks(checkpoint, network, tokens, ON_HOST, Stages(), dtype)
    return Pruning(blocks, request, progress)
