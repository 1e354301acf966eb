# SPDX-License-Identifier: Apache-2.0
"""Quantized weights on CPU: speed, memory, start, quality.

    .venv/bin/python -m benchmarks.weights [--part NAME] [--out FILE]

speed    Tokens per second of int4 over bf16, 1.1B random Llama (TinyLlama's shape), eager mode,
         groups of 128. Our default for activations, which is int8 on a CPU with AMX. Takes --row.
  decode_ratio_b1, _b8, _b32     1, 8, 32 requests at once
  prefill_ratio                  one prompt of 512 tokens
  vs_vllm_w4a16_b1, _b8          over vLLM's int4 kernel on the same checkpoint, 16-bit activations
  Extra, for W in b1, b8, b32, prefill: vs_vllm_w4a16_W for the other two, vs_vllm_default_W (vLLM's
  kernel as it comes: int8 activations on AMX), bf16_activations_ratio_W (ours with 16-bit
  activations over bf16), bf16_activations_vs_vllm_w4a16_W (like against like).
call     Linears of one of its layers, without an engine, where both call vLLM's AMX kernel.
  call_ratio_b1, _b8, _b32       vLLM's time over ours, with 1, 8, 32 rows
step     Whole decode steps of the demo model in engines of ours and of stock, likewise.
  step_ratio_b1, _b8, _b32       our tokens per second over stock's, with 1, 8, 32 requests
memory   The model of speed.
  weight_bytes_ratio             bytes of the written tensors, int4 over bf16, embeddings included
  resident_ratio                 growth of anonymous memory by loading, without KV cache
  Extra: resident_ratio_at_load (the bf16 checkpoint, quantized while loading).
load     Demo model, `--quantization smoothquant_plus` with default settings, against stock bf16.
  calibrate_pack_cpu_s           more processor seconds for a start with an empty plan cache
  second_start_extra_s           more wall seconds for a start with a warm one
  Extra: first_start_extra_s (wall), second_start_extra_cpu_s.
quality  Demo model, groups of 64: nats per token above 16 bits on 32 x 512 tokens of Newton's
         Opticks, and as second_text_KEY on as many of Python's language reference. Weights are
         dequantized and judged in float32, so the processor does not matter. Calibration for all
         but nats_at_load: the same 64 x 128 tokens, sampled by the model. KEY_se is a standard
         error, paired with 16 bits by window. KEY_bits: bits per weight of the decoder's linears,
         with scales and zero points. What is finished is kept in the cache folder (losses by the
         weights that have them), so that an interrupted run goes on.
  nats_default                   `vllm-compress quantize` with default settings
  nats_at_load                   `--quantization smoothquant_plus` with default settings
  nats_best                      the best setting that is known, which is the default
  nats_paper                     SmoothQuant+ as published: norms only, no clipping, full search
  nats_rtn_asym                  round to nearest, the control
  nats_3bit_uniform              the same GPTQ
  nats_35bit_probe, nats_35bit_evopress, nats_45bit_probe
                                 3.5 and 4.5 bits per weight in codes, among levels of 2 to 6 bits;
                                 with scales and zero points 3.80 and 4.82, which is the budget.
                                 KEY_search_cpu_s: processor seconds of the search
  nats_awq, nats_gptq_sym        llm-compressor's, asymmetric and symmetric (benchmarks/peers.py)
  nats_autoround                 AutoRound's default recipe, symmetric
  Extra: nats_bf16_absolute (16 bits), nats_rtn_sym, nats_autoround_light (50 iterations a block in
  place of 200), nats_rsq, nats_rsq_3bit, nats_rsq_3bit_paper, nats_35bit_baq, _luq, _hessian,
  _hessian_pairwise.
  Of engines, on 4 windows of the first text: nats_default_served (this plugin, 16-bit activations),
  nats_default_int8, nats_default_vllm_kernel; nats_default_judged is the judge's on the same.
  nats_default_served_gap        how far served is from judged; up to 0.03 is bfloat16's
cost     Quantizing with default settings.
  vs_awq_wall_ratio              wall time over AWQ's, demo model, same text; they take turns, once
  calibration_peak_ratio         peak memory of the process over the 16-bit weights, 1.1B random
                                 Llama, 16 x 128 tokens; with Python, torch and mapped files. The
                                 model is in float32 where the processor computes that faster
  Extra: vs_awq_cpu_ratio, calibration_anonymous_ratio (without mapped files).

Limits. The demo model is tiny and its weights come from a 4-bit file with groups of 32 (see
vllm_plugin/demo_model.py): the order of methods may differ on a large 16-bit model. Random weights
say nothing about quality and everything about speed. Timings need a machine that does nothing else.
"""

import sys

from benchmarks.common import Part, main
from benchmarks.weights_call import KEYS, call
from benchmarks.weights_cost import cost
from benchmarks.weights_quality import TEXTS, quality
from benchmarks.weights_speed import STEP_KEYS, speed, step
from benchmarks.weights_start import load, memory

DECODE = ("decode_ratio_b1", "decode_ratio_b8", "decode_ratio_b32")
VERSUS = ("vs_vllm_w4a16_b1", "vs_vllm_w4a16_b8")
NATS = (
    *("nats_default", "nats_at_load", "nats_best", "nats_paper", "nats_rtn_asym"),
    *("nats_awq", "nats_gptq_sym", "nats_autoround", "nats_3bit_uniform"),
    *("nats_35bit_probe", "nats_35bit_evopress", "nats_45bit_probe"),
)
BITS = tuple(f"{key}_bits" for key in NATS if "bit_" in key)
SERVED = ("nats_default_served", "nats_default_served_gap")
PARTS = {
    "speed": Part((*DECODE, "prefill_ratio", *VERSUS), speed),
    "call": Part(tuple(KEYS.values()), call),
    "step": Part(tuple(STEP_KEYS.values()), step),
    "memory": Part(("weight_bytes_ratio", "resident_ratio"), memory),
    "load": Part(("calibrate_pack_cpu_s", "second_start_extra_s"), load),
    "quality": Part((*(prefix + key for prefix in TEXTS for key in NATS), *BITS, *SERVED), quality),
    "cost": Part(("vs_awq_wall_ratio", "calibration_peak_ratio"), cost),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
