# SPDX-License-Identifier: Apache-2.0
"""Runs in the overlay of ``benchmarks.peers``: METHOD MODEL WINDOWS.json OUT DTYPE.

Every method gets the same windows and groups of 64, and writes a compressed-tensors checkpoint that
stock vLLM serves, with scales of 16 bits. Everything else is the default of the tool. DTYPE is what
it calibrates in: float32 where bfloat16 is slow, as ours does.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
# The tool's recipes, as its documentation gives them.
AUTOROUND: dict[str, dict[str, Any]] = {
    "autoround": {},
    "autoround_light": {"iters": 50, "lr": 5e-3},
}


def main(method: str, model_folder: str, windows_file: str, out: str, dtype: str) -> None:
    with open(windows_file, encoding="utf-8") as file:
        windows = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    begin, cpu = time.perf_counter(), time.process_time()
    if method in AUTOROUND:
        autoround(method, model, tokenizer, windows, out)
    else:
        llm_compressor(method, model, tokenizer, windows, out)
    cost = {"wall_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    with open(f"{out}/cost.json", "w", encoding="utf-8") as file:
        json.dump(cost | {"dtype": dtype}, file)


def llm_compressor(
    method: str, model: Any, tokenizer: Any, windows: list[list[int]], out: str
) -> None:
    """AWQ, asymmetric, or GPTQ, symmetric."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # AWQ of 0.14.0.1 pins memory whether or not there is a device to pin it for, and crashes.
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    # The presets (W4A16, W4A16_ASYM) have groups of 128, which do not divide 576.
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=method == "gptq", strategy="group", group_size=GROUP
    )
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        recipe = [GPTQModifier(**scheme)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
        ),
        tokenizer=tokenizer,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    model.to(torch.bfloat16).save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def autoround(method: str, model: Any, tokenizer: Any, windows: list[list[int]], out: str) -> None:
    """A recipe of AutoRound; the default has 200 iterations a block and no zero points."""
    from auto_round import AutoRound

    recipe = AutoRound(
        model,
        tokenizer,
        scheme=f"W4A16G{GROUP}",
        dataset=[torch.tensor([ids]) for ids in windows],
        nsamples=len(windows),
        seqlen=len(windows[0]),
        device_map="cpu",
        amp=model.dtype != torch.float32,
        **AUTOROUND[method],
    )
    recipe.quantize_and_save(out, format="llm_compressor")
    [written] = Path(out).glob("*/config.json")  # in a folder that it names itself
    for file in written.parent.iterdir():
        file.rename(Path(out, file.name))
    written.parent.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
