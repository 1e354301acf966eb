# SPDX-License-Identifier: Apache-2.0
"""Run `vllm-compress` in this process: a new one would spend ten seconds on imports."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_plugin import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: exit code, output and errors of a command line in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """English prose for calibration, in the folder that a command runs in."""
    file = tmp_path / "text.txt"
    file.write_text((Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8"))
    return file
