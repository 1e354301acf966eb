# SPDX-License-Identifier: Apache-2.0
"""TODO"""

import sys

from benchmarks.common import Part, main
from benchmarks.weights_quality import quality
from benchmarks.weights_speed import speed
from benchmarks.weights_start import load, memory

PARTS = {
    "speed": Part(
        (
            "decode_ratio_b1",
            "decode_ratio_b8",
            "decode_ratio_b32",
            "prefill_ratio",
            "vs_vllm_w4a16_b1",
            "vs_vllm_w4a16_b8",
        ),
        speed,
    ),
    "memory": Part(("weight_bytes_ratio", "resident_ratio"), memory),
    "load": Part(("calibrate_pack_cpu_s", "second_start_extra_s"), load),
    "quality": Part(
        ("nats_paper", "nats_best", "nats_awq", "nats_gptq_sym", "nats_rtn_asym"), quality
    ),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
