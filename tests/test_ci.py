# SPDX-License-Identifier: Apache-2.0
"""CI runs lint and the fast tests, and fails if either does."""

import os
import subprocess
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / ".ci" / "run"


@pytest.mark.parametrize("fails", ["nothing", "lint", "test"])
def test_both_run_and_both_count(fails: str, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "made $1"\ntest "$1" != {fails}\n')
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [CI], env=os.environ | {"PATH": path, "CI": "true"}, capture_output=True, text=True
    )
    assert calls.read_text().split() == ["lint", "test"]
    assert (run.returncode == 0) == (fails == "nothing")
    assert run.stdout.splitlines()[-1] == "made test"
