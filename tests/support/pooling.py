# SPDX-License-Identifier: Apache-2.0
"""Tiny models that embed or classify: in a folder, in an engine, and in transformers."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from compress_common.checkpoints.checkpoint import Checkpoint
from quant_methods.formats.plan import Plan
from quant_methods.grid import QuantizedWeight
from tests.conftest import save_random
from tests.support.child import SINGLE_PROCESS, in_child, kernel

PROMPTS = ["The capital of France is Paris.", "def add(a, b):\n    return a + b", "Water boils."]
LABELS = 3
# name -> (config class in transformers, class, what differs from SHARED)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "embeds": ("Qwen3Config", "Qwen3Model", {"tie_word_embeddings": True}),  # names without model.
    "classifies": (
        "Qwen2Config",
        "Qwen2ForSequenceClassification",
        {"num_labels": LABELS, "tie_word_embeddings": False},
    ),
}


def make(name: str, folder: Path, tokenizer: Path, *, pooling: str = "lasttoken") -> Path:
    """Write a random model. One that embeds is as Sentence Transformers saves it."""
    kind, architecture, own = MODELS[name]
    save_random(folder, kind, own, getattr(transformers, architecture), 0, tokenizer)
    if name == "embeds":
        types = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(types)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        content = {"word_embedding_dimension": 128, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return folder


def served(model: Path, **engine: Any) -> torch.Tensor:
    """What an engine gives for PROMPTS: unit vectors, or probabilities, [prompts, numbers]."""
    env = os.environ | SINGLE_PROCESS | {"COMPRESS_INT4_ROWS": "16"}
    return torch.tensor(in_child(_served, str(model), engine, env=env, timeout=600))


def _served(model: str, engine: dict[str, Any]) -> list[list[float]]:
    """In a child."""
    from vllm import LLM

    llm = LLM(
        model,
        runner="pooling",
        max_model_len=256,
        enforce_eager=True,
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        **(kernel() | engine),
    )
    if "Classification" in llm.llm_engine.model_config.architectures[0]:
        found = [list(out.outputs.probs) for out in llm.classify(PROMPTS, use_tqdm=False)]
    else:
        found = [list(out.outputs.embedding) for out in llm.embed(PROMPTS, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    return found


@torch.no_grad()
def expected(folder: Path, plan: Plan | None, scratch: Path, *, mean: bool = False) -> torch.Tensor:
    """As ``served``, from transformers in float32, with the weights that a plan makes.

    Args:
        folder: Of the 16-bit model.
        plan: None: its own weights.
        scratch: Takes the rounded weights. Does not exist yet.
        mean: Whether the vectors of a prompt are averaged; else the last is taken.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    if plan is not None:
        shutil.copytree(folder, scratch)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in plan.transform(Checkpoint(folder).tensors(), torch.bfloat16):
            if isinstance(value, QuantizedWeight):
                tensors[f"{name}.weight"] = value.dequantize().float()
            else:
                tensors[name] = value.float().contiguous()
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        folder = scratch
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        if "Classification" in config.architectures[0]:
            rows.append(model(ids).logits[0].softmax(-1))
            continue
        hidden = model(ids).last_hidden_state[0]
        vector = hidden.mean(0) if mean else hidden[-1]
        rows.append(vector / vector.norm())
    return torch.stack(rows)
