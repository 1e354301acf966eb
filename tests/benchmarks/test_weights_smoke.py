# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.weights`` runs through on tiny models and keeps the contract of its last line."""

import json
from pathlib import Path

import pytest

from tests.support.benchmark import smoke

CONTRACT = {
    "decode_ratio_b1",
    "decode_ratio_b8",
    "decode_ratio_b32",
    "prefill_ratio",
    "vs_vllm_w4a16_b1",
    "vs_vllm_w4a16_b8",
    "weight_bytes_ratio",
    "resident_ratio",
    "nats_paper",
    "nats_best",
    "nats_awq",
    "nats_gptq_sym",
    "nats_rtn_asym",
    "calibrate_pack_cpu_s",
    "second_start_extra_s",
}


@pytest.mark.slow
def test_smoke_prints_every_key(demo_model: Path, tmp_path: Path):
    out = tmp_path / "full.json"
    line, details = smoke("weights", CONTRACT, out)
    nulls = {key for key in CONTRACT if line[key] is None}
    assert nulls == {"nats_awq", "nats_gptq_sym"}  # --smoke does not install the peers

    full = json.loads(out.read_text())
    assert full["machine_before"]["versions"]["torch"]
    served = details["speed_engines"]
    assert served["ours"]["quantization"] == "rtn"
    assert served["vLLM W4A16"]["kernels"] != served["ours"]["kernels"]
