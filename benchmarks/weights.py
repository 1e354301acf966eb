# SPDX-License-Identifier: Apache-2.0
"""int4 weights on CPU: speed, memory, start, quality.

    .venv/bin/python -m benchmarks.weights [--part speed|memory|load|quality] [--json] [--out FILE]

speed    Tokens per second of int4 over bf16, 1.1B random Llama (TinyLlama's shape), eager mode,
         groups of 128. Our default for activations, which is int8 on a CPU with AMX.
  decode_ratio_b1, _b8, _b32     1, 8, 32 requests at once
  prefill_ratio                  one prompt of 512 tokens
  vs_vllm_w4a16_b1, _b8          over vLLM's int4 kernel on the same checkpoint, 16-bit activations
  Extra, for W in b1, b8, b32, prefill: vs_vllm_w4a16_W for the other two, vs_vllm_default_W (vLLM's
  kernel as it comes: int8 activations on AMX), bf16_activations_ratio_W (ours with 16-bit
  activations over bf16), bf16_activations_vs_vllm_w4a16_W (like against like).
memory   The same model.
  weight_bytes_ratio             bytes of the written tensors, int4 over bf16, embeddings included
  resident_ratio                 growth of anonymous memory by loading, without KV cache
  Extra: resident_ratio_at_load (the bf16 checkpoint, quantized while loading).
load     Demo model, `--quantization smoothquant_plus` with default settings, against stock bf16.
  calibrate_pack_cpu_s           more processor seconds for a start with an empty plan cache
  second_start_extra_s           more wall seconds for a start with a warm one
  Extra: first_start_extra_s (wall), second_start_extra_cpu_s.
quality  Demo model, groups of 64: nats per token above bf16 on 32 x 512 tokens of Newton's Opticks.
         Calibration for all: the same 64 x 128 tokens, sampled by the model. NAME_se is a standard
         error, paired with bf16 by window. Activations are 16-bit, so that weights are judged.
  nats_paper                     SmoothQuant+ as published: norms only, no clipping, full search
  nats_best                      all folds, clipping, GPTQ compensation; coarse search
  nats_awq, nats_gptq_sym        llm-compressor's, asymmetric and symmetric (benchmarks/peers.py)
  nats_rtn_asym                  round to nearest, the control
  Extra: nats_bf16_absolute, nats_rtn_sym, nats_rtn_gptq (GPTQ without smoothing), nats_default (our
  default settings); of nats_best: nats_best_vllm_kernel (by the kernel that also serves the peers),
  nats_best_int8 (int8 activations).

Limits. The demo model is tiny and its weights come from a 4-bit file with groups of 32 (see
vllm_plugin/demo_model.py): the order of methods may differ on a large 16-bit model. Random weights
say nothing about quality and everything about speed. Timings need a machine that does nothing else.
"""

import sys

from benchmarks.common import Part, main
from benchmarks.weights_quality import quality
from benchmarks.weights_speed import speed
from benchmarks.weights_start import load, memory

DECODE = ("decode_ratio_b1", "decode_ratio_b8", "decode_ratio_b32")
VERSUS = ("vs_vllm_w4a16_b1", "vs_vllm_w4a16_b8")
NATS = ("nats_paper", "nats_best", "nats_awq", "nats_gptq_sym", "nats_rtn_asym")
PARTS = {
    "speed": Part((*DECODE, "prefill_ratio", *VERSUS), speed),
    "memory": Part(("weight_bytes_ratio", "resident_ratio"), memory),
    "load": Part(("calibrate_pack_cpu_s", "second_start_extra_s"), load),
    "quality": Part(NATS, quality),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
