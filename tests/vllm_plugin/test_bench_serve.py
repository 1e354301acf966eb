# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve`, unmodified, against a compressed server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import serving


@pytest.mark.slow
def test_vllm_bench_serve(demo_model: Path, tmp_path: Path) -> None:
    kv = {"policy": "snap_kv", "keep": 0.25}
    arguments = ["--additional-config", json.dumps({"compress": {"kv": kv}})]
    arguments += ["--quantization", "smoothquant_plus", "--max-model-len", "1024"]
    with serving(demo_model, *arguments) as server:
        command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve"]
        command += ["--base-url", server.url, "--backend", "openai-chat"]
        command += ["--endpoint", "/v1/chat/completions", "--model", "demo"]
        command += ["--tokenizer", str(demo_model), "--dataset-name", "random"]
        command += ["--random-input-len", "300", "--random-output-len", "16"]
        command += ["--num-prompts", "12", "--max-concurrency", "4", "--ignore-eos"]
        command += ["--save-result", "--result-dir", str(tmp_path)]
        subprocess.run(command, check=True, timeout=400, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert server.value("vllm_compress_kv_eligible_requests_total") >= 12
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["completed"] == 12 and result["total_output_tokens"] == 12 * 16
