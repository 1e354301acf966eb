# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.weights`` runs through on tiny models and keeps the contract of its last line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
    command = [sys.executable, "-m", "benchmarks.weights", "--json", "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    line = json.loads(done.stdout.splitlines()[-1])

    assert line.keys() >= CONTRACT
    for key, value in line.items():
        if key.endswith("_why"):
            assert isinstance(value, str)
        elif value is None:
            assert line[f"{key}_why"]
        else:
            assert isinstance(value, int | float)
    nulls = {key for key in CONTRACT if line[key] is None}
    assert nulls == {"nats_awq", "nats_gptq_sym"}  # --smoke does not install the peers

    full = json.loads(out.read_text())
    assert full["result"] == line
    assert full["machine_before"]["versions"]["torch"]
    served = full["details"]["speed_engines"]
    assert served["ours"]["quantization"] == "rtn"
    assert served["vLLM W4A16"]["kernels"] != served["ours"]["kernels"]
