# SPDX-License-Identifier: Apache-2.0
"""One engine, quantized at load, that sleeps, wakes and reloads its weights.

``reload(model, quantization, steps)`` is the caller's side. The answer has ``errors`` by step, and
the greedy ``tokens`` before the first step and after each but ``sleep``. A step is one of

- ``sleep`` (level 2) and ``wake``,
- ``disk``: ``reload_weights``,
- ``path``: ``reload_weights`` from an edited copy of the model,
- ``tensors``: ``reload_weights`` with the 16-bit tensors of the model,
- ``edit``: negate one tensor of the model's file.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from tests.support.child import SINGLE_PROCESS, in_child, kernel

ENGINE = {
    "max_model_len": 256,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.2,
}
PROMPTS = ["The capital of France is", "def fibonacci(n):"]


def reload(
    model: Path, quantization: str, steps: list[str], settings: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """Run the steps one after the other; EngineFailed when the engine dies."""
    environment = os.environ | SINGLE_PROCESS
    environment |= {"VLLM_COMPRESS_CACHE": str(cache), "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"COMPRESS_INT4_ROWS": "16"}
    request = {
        "model": str(model),
        "steps": steps,
        "engine": {
            "quantization": quantization,
            "additional_config": {"compress": {"weights": settings}},
        },
    }
    return in_child(_reload, request, env=environment, timeout=300)


def _reload(request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file
    from vllm import LLM, SamplingParams

    weights = Path(request["model"]) / "model.safetensors"
    llm = LLM(request["model"], **(kernel() | ENGINE | request["engine"]))
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def tokens() -> list[list[int]]:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def edit(file: Path = weights) -> None:
        state = load_file(file)
        name = "model.layers.1.mlp.down_proj.weight"
        save_file(state | {name: -state[name]}, file, metadata={"format": "pt"})

    def path() -> None:
        copy = shutil.copytree(weights.parent, weights.parent.with_name("copy"))
        edit(copy / weights.name)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(copy)})

    actions = {
        "sleep": lambda: llm.sleep(2),
        "wake": lambda: llm.wake_up(),
        "disk": lambda: llm.collective_rpc("reload_weights"),
        "tensors": lambda: llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": list(load_file(weights).items())}
        ),
        "path": path,
        "edit": edit,
    }
    errors: list[str | None] = []
    said = [tokens()]
    for step in request["steps"]:
        try:
            actions[step]()
            errors.append(None)
        except Exception as error:
            errors.append(str(error))
        if step != "sleep":
            llm.llm_engine.reset_prefix_cache()
            said.append(tokens())
    return {"errors": errors, "tokens": said}
