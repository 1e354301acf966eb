# SPDX-License-Identifier: Apache-2.0
"""Runs in the overlay of ``benchmarks.peers``: METHOD MODEL WINDOWS.json OUT."""

import json
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.accelerator.is_available():
    # AWQ of 0.14.0.1 pins memory whether or not there is a device to pin it for, and crashes.
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def main(method: str, model_folder: str, windows_file: str, out: str) -> None:
    with open(windows_file, encoding="utf-8") as file:
        windows = json.load(file)
    # The presets (W4A16, W4A16_ASYM) have groups of 128, which do not divide 576.
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=method == "gptq", strategy="group", group_size=64
    )
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        recipe = [GPTQModifier(**scheme)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    begin, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        dataset=Dataset.from_dict(
            {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
        ),
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
        output_dir=out,
    )
    cost = {"wall_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    with open(f"{out}/cost.json", "w", encoding="utf-8") as file:
        json.dump(cost, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
