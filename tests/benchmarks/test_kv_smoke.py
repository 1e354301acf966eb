# SPDX-License-Identifier: Apache-2.0
"""The KV benchmarks run through in small and keep the contract of their last line."""

from pathlib import Path

import pytest
import torch

from benchmarks.common import Options, Result
from benchmarks.kv_capacity_plan import plan
from tests.support.benchmark import smoke

POLICIES = ("prefix_kv", "snap_kv", "key_diff", "recent", "cskv", "fp8")
CAPACITY = {
    "full_peak_running",
    "keep100_throughput_ratio",
    "compaction_share_of_prefill",
    "builder_ms_per_group_step",
    "levels4_throughput_ratio",
    "decode_window_steps_ratio",
    "plan_ms_mixed_step",
    "plan_ms_mixed_step_long",
    "plan_long_ratio",
    *(f"{name}_turn_hits" for name in ("full", "keep_050", "keep_025", "budget_512")),
} | {
    f"{policy}_{key}"
    for policy in POLICIES
    for key in ("steps_ratio", "peak_running", "preemptions", "kept")
}
QUALITY = {
    "wordings",
    "snap_kv_025_passkey_mean",
    "h2o_025_passkey_min",
    "full_passkey",
    "full_needles",
    "fp8_passkey",
    "fp8_needles",
    "fp8_nats",
} | {
    f"{policy}_{keep}_{key}"
    for policy in POLICIES[:-1]
    for keep in ("050", "025", "010")
    for key in ("passkey", "needles", "nats")
}

# vLLM's own fp8 cache needs AVX-512 on a CPU.
_FP8_REFUSED = () if torch.cpu._is_avx512_supported() else ("fp8_",)


def test_planning_is_measured_without_an_engine() -> None:
    result = Result()
    plan(Options(smoke=True, rounds=1, seed=0), result)
    assert {"plan_ms_mixed_step", "plan_ms_mixed_step_long"} < result.values.keys()
    assert all(value is not None and value > 0 for value in result.values.values())


@pytest.mark.slow
def test_capacity(demo_model: Path, tmp_path: Path):
    line, details = smoke("kv_capacity", CAPACITY, tmp_path / "capacity.json")
    left_out = ("snap_kv_", "key_diff_", "recent_", "cskv_", *_FP8_REFUSED)  # by --smoke
    left_out += ("keep_050_", "budget_512_")
    assert {key for key in CAPACITY if line[key] is None} == {
        key for key in CAPACITY if key.startswith(left_out)
    }
    assert 0 < line["keep_025_turn_hits"] < line["full_turn_hits"]
    assert line["prefix_kv_kept"] < 1
    assert line["prefix_kv_steps_ratio"] < 1
    served = details["pool_served"]
    assert len(served["prefix_kv"]["engine"]["groups"]) == 2
    # Equal bytes, and every block comes back.
    assert len({one["engine"]["pool_bytes"] for one in served.values()}) == 1
    for one in served.values():
        assert one["free_blocks_at_end"] == one["engine"]["blocks"] - 1
    assert served["full"]["blocks_freed"] == 0 < served["prefix_kv"]["blocks_freed"]


@pytest.mark.slow
def test_quality(demo_model: Path, tmp_path: Path):
    out = tmp_path / "quality.json"
    line, _ = smoke("kv_quality", QUALITY, out)
    measured = {key for key in QUALITY if line[key] is not None}
    assert measured >= {"full_passkey", "full_needles", "snap_kv_025_nats", "wordings"}
    assert measured >= {"snap_kv_025_passkey_mean"} and line["wordings"] == 2
    assert ("fp8_nats" in measured) is not bool(_FP8_REFUSED)
    assert line["full_passkey"] == 1
    # Forcing tokens in decode is measuring them in a prompt: bfloat16 rounds differently.
    assert abs(line["forced_minus_prompt_nats"]) < 0.05
    pytest.importorskip("matplotlib")
    assert out.with_suffix(".png").is_file()


@pytest.mark.slow
def test_decode(demo_model: Path, tmp_path: Path):
    contract = {"full_recall", "full_peak_blocks", "long_peak_growth", "long_throughput_ratio"}
    contract |= {
        f"{policy}_{budget}_{key}"
        for policy in ("snap_kv", "h2o", "r_kv", "expected_attention", "key_diff", "recent")
        for budget in (256, 512, 1024)
        for key in ("recall", "nats", "peak_blocks")
    }
    line, _ = smoke("kv_decode", contract, tmp_path / "decode.json")
    assert line["full_recall"] > 0 and line["h2o_256_nats"] is not None
    # A resumed request computes what it had decoded, windows and their compaction included.
    assert line["resumed_minus_decoded_nats"] < 0.05
    assert line["h2o_256_peak_blocks"] <= (256 + 128) // 32 + 1 < line["full_peak_blocks"]
    assert line["long_peak_growth"] == 1


@pytest.mark.slow
def test_cskv(demo_model: Path, tmp_path: Path):
    contract = {
        "bytes_per_token_ratio_080",
        "bytes_per_token_ratio_086_int4",
        "decode_ratio_b8_2000",
        "recon_error_vs_svd_max",
        "recon_error_vs_asvd_max",
        "cskv_nats",
        "cskv_passkey",
        "cskv_record",
        "tp1_16bit_nats",
        "tp3_16bit_record",
    }
    line, _ = smoke("cskv", contract, tmp_path / "cskv.json")
    assert line["bytes_per_token_ratio_086_int4"] < line["bytes_per_token_ratio_080"] < 0.25
    assert 0 < line["recon_error_vs_asvd_max"] < 1
    for side in ("key", "value"):  # bases of all heads lose less in the same bytes
        assert 0 < line[f"tp1_16bit_{side}_error"] < line[f"tp3_16bit_{side}_error"] < 1


@pytest.mark.slow
def test_vision(tmp_path: Path):
    contract = {"full_asked", "full_later"} | {
        f"{policy}_{keep}_{what}"
        for policy in ("snap_kv", "prefix_kv", "prefix_kv_uniform", "key_diff", "h2o", "recent")
        for keep in ("050", "025", "010")
        for what in ("asked", "later", "asked_nats", "later_nats")
    }
    out = tmp_path / "vision.json"
    line, _ = smoke("kv_vision", contract, out)
    assert line["full_asked"] == line["full_later"] == 1
    assert line["snap_kv_010_later_nats"] > line["full_later_nats"]
    assert line["prefix_kv_025_later_nats"] > line["full_later_nats"]
    pytest.importorskip("matplotlib")
    assert out.with_suffix(".png").is_file()
