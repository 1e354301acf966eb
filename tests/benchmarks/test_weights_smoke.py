# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.weights`` runs through on tiny models and keeps the contract of its last line."""

import json
from pathlib import Path

import pytest

from benchmarks.weights_speed import no_amx, no_avx512
from tests.support.benchmark import smoke

NATS = {
    "nats_default",
    "nats_at_load",
    "nats_best",
    "nats_paper",
    "nats_rtn_asym",
    "nats_3bit_uniform",
    "nats_35bit_probe",
    "nats_35bit_evopress",
    "nats_45bit_probe",
}
PEERS = {"nats_awq", "nats_gptq_sym", "nats_autoround"}
CONTRACT = {
    "decode_ratio_b1",
    "decode_ratio_b8",
    "decode_ratio_b32",
    "prefill_ratio",
    *(f"step_ratio_b{batch}" for batch in (1, 8, 32)),
    "call_ratio_b1",
    "call_ratio_b8",
    "call_ratio_b32",
    "vs_vllm_w4a16_b1",
    "vs_vllm_w4a16_b8",
    "weight_bytes_ratio",
    "resident_ratio",
    *(prefix + key for prefix in ("", "second_text_") for key in NATS | PEERS),
    "nats_3bit_uniform_bits",
    "nats_35bit_probe_bits",
    "nats_35bit_evopress_bits",
    "nats_45bit_probe_bits",
    "nats_default_served",
    "nats_default_served_gap",
    "vs_awq_wall_ratio",
    "calibration_peak_ratio",
    "calibrate_pack_cpu_s",
    "second_start_extra_s",
}


@pytest.mark.slow
def test_smoke_prints_every_key(demo_model: Path, tmp_path: Path):
    out = tmp_path / "full.json"
    line, details = smoke("weights", CONTRACT, out)
    nulls = {key for key in CONTRACT if line[key] is None}
    # --smoke does not install the peers
    expected = {p + k for p in ("", "second_text_") for k in PEERS} | {"vs_awq_wall_ratio"}
    if no_amx():
        expected |= {f"{part}_ratio_b{n}" for part in ("call", "step") for n in (1, 8, 32)}
    if no_avx512():
        expected |= {"vs_vllm_w4a16_b1", "vs_vllm_w4a16_b8"}
    assert nulls == expected
    assert line["nats_35bit_probe_bits"] <= 3.5 + (16 + 3.5) / 64  # the budget
    assert line["nats_default_served_gap"] < 0.03
    assert line["calibration_peak_ratio"] >= line["calibration_anonymous_ratio"] > 1

    full = json.loads(out.read_text())
    assert full["machine_before"]["versions"]["torch"]
    served = details["speed_engines"]
    assert served["ours"]["quantization"] == "rtn"
    if not no_avx512():
        assert served["vLLM W4A16"]["kernels"] != served["ours"]["kernels"]
