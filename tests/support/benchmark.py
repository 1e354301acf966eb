# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark small, and check what all of them promise of their last line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.child import ROOT


def smoke(name: str, contract: set[str], out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The closing line of ``benchmarks.NAME --smoke``, checked, and the details of ``--out``."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1100)
    assert done.returncode == 0, done.stderr[-4000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line.keys() >= contract
    for key, value in line.items():
        if key.endswith("_why"):
            assert isinstance(value, str)
        elif value is None:
            assert line[f"{key}_why"]
        else:
            assert isinstance(value, int | float)
    full = json.loads(out.read_text())
    assert full["result"] == line
    return line, full["details"]
