# SPDX-License-Identifier: Apache-2.0
"""The check of a GPU: a part that hangs costs its limit only, and no figure is lost."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import NotHere, Options, Part, Result, main
from benchmarks.gpu import PARTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402


def test_every_part_of_the_benchmark_has_a_limit() -> None:
    assert set(gpu_check.LIMITS) == set(PARTS) | {"tests"}


def test_a_figure_is_written_when_it_is_measured(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"

    def breaks(options: Options, result: Result) -> None:
        result.put("first", 1.5, raw_ms=3)
        assert lines.read_text() == json.dumps({"key": "first", "value": 1.5, "raw_ms": 3}) + "\n"
        raise RuntimeError("the device is gone")

    parts = {"a": Part(("first", "second"), breaks), "b": Part(("third",), breaks)}
    assert main("", parts, ["--json", "--smoke", "--part", "a", "--lines", str(lines)]) == 1
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert written[1:] == [
        {"key": "second", "value": None, "why": "RuntimeError: the device is gone"}
    ]  # and nothing of the part that was not asked for


def test_what_a_machine_cannot_run_is_no_fault(tmp_path: Path) -> None:
    def cannot(options: Options, result: Result) -> None:
        raise NotHere("needs an NVIDIA GPU")

    lines = tmp_path / "lines.jsonl"
    assert main("", {"a": Part(("key",), cannot)}, ["--json", "--lines", str(lines)]) == 0
    assert json.loads(lines.read_text())["why"] == "needs an NVIDIA GPU"


def test_a_run_begins_with_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_COMMIT", "abc1234")
    about = gpu_check.header(dry=True)
    assert (about["commit"], about["dry"]) == ("abc1234", True)
    assert about["device"]


def test_a_part_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    code = code.replace("open(", "import os, time; open(", 1)
    ended = gpu_check.run_part("stack", [sys.executable, "-c", code], 3)
    assert ended["ended"] == "out of time"
    assert 3 <= ended["seconds"] < 30
    for _ in range(100):  # init takes the child's exit status
        state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("what the part had started still runs")


def test_the_table_says_which_targets_are_met() -> None:
    records = [
        {"key": "keep1_decode_ratio_b1", "value": 0.99},
        {"key": "snap_kv_tokens_ratio", "value": None, "why": "no GPU"},
        {"key": "calibration_s", "value": 31.0},
        {"note": "stock_started", "value": {}},
        {"part": "decode", "ended": "ok", "seconds": 3},
    ]
    assert gpu_check.table(records).splitlines() == [
        f"  {'keep1_decode_ratio_b1':<40} 0.99  (target 0.98: met)",
        f"  {'snap_kv_tokens_ratio':<40} no GPU  (target 1.8: missed)",
        f"  {'calibration_s':<40} 31  (target 30.0: missed)",
        "decode: ok in 3 s",
    ]
