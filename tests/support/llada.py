# SPDX-License-Identifier: Apache-2.0
"""A random tiny LLaDA: the folder that an engine serves, and the dense model it must agree with."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from dllm_denoising.dense import DenseLLaDA, Shape


def random_llada(
    folder: Path, layers: int = 4, heads: int = 4, scale: float = 3.0, seed: int = 0
) -> DenseLLaDA:
    """Write config and float32 weights to ``folder``, without a tokenizer, and return the model.

    scale: of all matrices; larger makes predictions more certain, and caches go stale faster.
    """
    shape = Shape(heads * 32, layers, heads, heads, 256, 64)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DenseLLaDA(shape).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(scale)
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **asdict(shape),
        "embedding_size": 64,
        "mask_token_id": 63,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "max_sequence_length": 512,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model
