# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of a tiny model, and what its folds cost. Each runs in a new process."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.models_kv import Kept
from compress_common.calibration.blocks import Blocks
from compress_common.calibration.precision import computed_in
from compress_common.calibration.texts import stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import load_model
from compress_common.progress import silent
from compress_common.structure.derive import structure_of
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from quant_methods.transforms.prove import proved_folds

Sequences = list[tuple[list[int], list[int]]]  # prompt, answer


@torch.no_grad()
def judged(
    model: Path,
    architecture: str,
    answers: Sequences,
    of_prompt: bool,
    kept: Kept | None = None,
) -> dict[str, list[Any]]:
    """Judge answers with the float32 model.

    Args:
        model: A folder.
        architecture: The class of the model in transformers.
        answers: Prompts with their answers.
        of_prompt: Whether prompts are judged too.
        kept: What snap_kv leaves of a prompt for the answer; None: all.

    Returns:
        ``nats`` as ``FamilyChild.answer`` has them, and the ``tokens`` that are most likely after
        each prompt and each part of its answer.
    """
    import transformers

    kind = getattr(transformers, architecture)
    # Other implementations of attention ignore caps of its logits.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    network = kind.from_pretrained(model, **options).eval()
    nats, best = [], []
    for prompt, answer in answers:
        if kept is not None:
            kept.after(network, len(prompt))
        tokens = torch.tensor([prompt + answer])
        logits = network(input_ids=tokens).logits[0, :-1].float()
        every = -logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        nats.append(every[0 if of_prompt else -len(answer) :].tolist())
        best.append(logits[-len(answer) :].argmax(-1).tolist())
    return {"nats": nats, "tokens": best}


def write_rounded(model: Path, target: Path, request: PlanRequest, cache: Path) -> Path:
    """Write the 16-bit model that a plan's rounded weights stand for, in float32."""
    os.environ["VLLM_COMPRESS_CACHE"] = str(cache)
    checkpoint = Checkpoint(model)
    plan, _ = obtain_plan(checkpoint, request)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in plan.transform(checkpoint.tensors(), torch.bfloat16):
        if isinstance(value, QuantizedWeight):
            tensors[f"{name}.weight"] = value.dequantize().float()
        else:
            tensors[name] = value.float().contiguous()
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((model / "config.json").read_bytes())
    return target


def fold_seconds(model: Path, request: PlanRequest, cache: Path) -> dict[str, float]:
    """CPU seconds of ``following`` a model without weights, and of ``proving`` its folds.

    Args:
        model: A folder.
        request: How it is calibrated.
        cache: Where its calibration text may lie.
    """
    os.environ["VLLM_COMPRESS_CACHE"] = str(cache)
    checkpoint = Checkpoint(model)
    config = checkpoint.hf_config
    begin = time.process_time()
    structure = structure_of(config)
    following = time.process_time() - begin

    dtype = computed_in(checkpoint.weight_bytes, "cpu")
    network = load_model(checkpoint, dtype)
    tokens = stored_tokens(checkpoint, request.calibration, network, silent, dtype)
    blocks = Blocks(network, structure, tokens)
    begin = time.process_time()
    proved_folds(blocks)
    return {"following": following, "proving": time.process_time() - begin}


def calibration_seconds(model: Path, request: PlanRequest, cache: Path) -> float:
    """CPU seconds of a calibration with nothing in the cache."""
    os.environ["VLLM_COMPRESS_CACHE"] = str(cache)
    begin = time.process_time()
    obtain_plan(Checkpoint(model), request)
    return time.process_time() - begin
