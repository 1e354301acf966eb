# SPDX-License-Identifier: Apache-2.0
"""Check on a GPU what the CPU tests cannot show, most valuable first, in 18 minutes at most.

    .venv/bin/python tools/gpu_check.py [--dry-run] [--part NAME ...] [--seconds 1100] [--out FILE]

Each part of `benchmarks.gpu` runs in a process of its own with a time limit, and writes each
figure to a file of JSON lines as soon as it is measured: a part that hangs or breaks costs only
itself. The file begins with the commit, the device and the command. `--dry-run` runs every part
shrunk, on a CPU too, where parts that need a GPU say so; its file is temporary. The exit status is
1 when a part failed or ran out of time.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is run by its path
from benchmarks.common import append, source  # noqa: E402

# Seconds that a part may take. A start of engines is about 30 of them. ``tests`` are the project's.
LIMITS = {
    "stack": 60,
    "identity": 120,
    "decode": 150,
    "int4": 120,
    "tests": 75,
    "kernel": 75,
    "pool": 100,
    "syncs": 60,
    "latents": 100,
    "denoise": 110,
    "calibration": 150,
    "defaults": 120,
}
# What issue and README ask of a GPU: the least that a figure should be.
TARGETS = {
    "keep1_same_as_stock": 1.0,
    "keep1_decode_ratio_b1": 0.98,
    "keep1_decode_ratio_b8": 0.98,
    "keep1_decode_ratio_b64": 0.98,
    "snap_kv_int4_decode_ratio_b1": 0.97,
    "snap_kv_requests_ratio": 2.5,
    "snap_kv_tokens_ratio": 1.8,
}
# And the most: seconds.
LIMITED = {"calibration_s": 30.0}
TESTS = (
    "tests/vllm_plugin/kv_cache/test_latent_triton.py",
    "tests/quant_methods/roundings/test_gptq_triton.py",
)


def command(name: str, lines: Path, dry: bool, rounds: int) -> list[str]:
    """Return the command of a part. It appends its figures to ``lines``."""
    if name == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    part = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--lines", str(lines)]
    return [*part, "--smoke"] if dry else [*part, "--rounds", str(rounds)]


def run_part(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    """Run one part and kill it, with all that it started, when its time is over.

    Returns:
        The name, how it ended and the seconds it took.
    """
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, start_new_session=True
    )
    try:
        ended = "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        ended = "out of time"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"part": name, "ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def header(dry: bool) -> dict[str, Any]:
    """Return what figures depend on, as the first record of a run."""
    import torch

    return {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source() or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dry": dry,
        "command": sys.argv,
    }


def table(records: list[dict[str, Any]]) -> str:
    """All figures of the file as lines of text, with their targets."""
    rows = []
    for record in records:
        if "key" in record:
            value, key = record["value"], record["key"]
            shown = record.get("why", "-") if value is None else f"{value:.4g}"
            met = ""
            if (target := TARGETS.get(key, LIMITED.get(key))) is not None:
                reached = value is not None and (
                    value <= target if key in LIMITED else value >= target
                )
                met = f"  (target {target}: {'met' if reached else 'missed'})"
            rows.append(f"  {record['key']:<40} {shown}{met}")
        elif "part" in record:
            rows.append(f"{record['part']}: {record['ended']} in {record['seconds']} s")
    return "\n".join(rows)


def main() -> int:
    """Run the parts in order; print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="every part shrunk, on a CPU too")
    parser.add_argument("--part", action="append", choices=list(LIMITS), help="may be repeated")
    parser.add_argument("--seconds", type=float, default=1100, help="of all parts together")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of contenders")
    parser.add_argument("--out", type=Path, help="file of JSON lines; appended to")
    given = parser.parse_args()
    about = header(given.dry_run)
    lines = given.out or (
        Path(tempfile.mkdtemp()) / "dry-run.jsonl"
        if given.dry_run
        else ROOT / "benchmarks/results" / f"gpu-{about['run'][:10]}-{about['commit']}.jsonl"
    )
    lines.parent.mkdir(parents=True, exist_ok=True)
    append(lines, about)
    until, failed = time.monotonic() + given.seconds, False
    for name in given.part or LIMITS:
        limit = LIMITS[name] * (10 if given.dry_run else 1)
        left = limit if given.dry_run else min(limit, until - time.monotonic())
        if left < 10:
            ended = {"part": name, "ended": "not run, no time was left", "seconds": 0}
        else:
            wanted = command(name, lines.resolve(), given.dry_run, given.rounds)
            ended = run_part(name, wanted, left)
        failed |= ended["ended"] != "ok"
        append(lines, ended)
        print(ended, flush=True)
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    print(table(records[records.index(about) :]), flush=True)
    print(f"written to {lines}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
