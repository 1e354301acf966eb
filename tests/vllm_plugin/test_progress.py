# SPDX-License-Identifier: Apache-2.0
"""Progress of long steps: a bar on a terminal, a line now and then elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from vllm_plugin.progress import Pace, bar, lines

STEPS = """if True:
    from vllm_plugin.progress import bar
    with bar() as progress:
        for done in range(1000):
            progress("calibrate", done, 1000)
        raise SystemExit("error: no space left")
"""


def test_a_log_gets_one_line_in_each_period(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 0.0
    progress = lines(now=lambda: seconds, period=30)
    for seconds in range(100):
        progress("calibrate", int(seconds), 100)
    printed = capsys.readouterr()
    assert printed.out == ""
    left = {0: "", 30: ", 1:10 left", 60: ", 0:40 left", 90: ", 0:10 left"}
    expected = [f"vllm-compress: calibrate {done}/100{text}" for done, text in left.items()]
    assert printed.err.splitlines() == expected


def test_what_a_resumed_step_had_done_before_does_not_speed_it_up() -> None:
    seconds = 0.0
    pace = Pace(lambda: seconds)
    assert pace.left("layers", 50, 100) == ""
    seconds = 3600
    assert pace.left("layers", 75, 100) == "1:00:00 left"
    assert pace.left("write", 0, 4) == "" and pace.left("write", 4, 4) == ""


def test_a_rank_without_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 0.0
    progress = lines(disable=True, now=lambda: seconds, period=30)
    seconds = 60
    progress("calibrate", 1, 2)
    with bar(disable=True) as progress:
        progress("calibrate", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("disable", [False, True])
def test_bars_of_transformers_return_after_a_step(disable: bool) -> None:
    from transformers.utils import logging as hf_logging

    hf_logging.enable_progress_bar()
    with pytest.raises(RuntimeError), bar(disable=disable):
        assert not hf_logging.is_progress_bar_enabled()
        raise RuntimeError
    assert hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # by the user
    try:
        with bar(disable=disable):
            pass
        assert not hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.enable_progress_bar()


def test_a_pipe_gets_no_carriage_return() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True)
    assert done.stderr == b"vllm-compress: calibrate 0/1000\nerror: no space left\n"


def test_on_a_terminal_an_error_starts_on_a_line_of_its_own() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", STEPS], stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    process.wait()
    os.close(ours)
    assert b"calibrate" in shown
    *_, cleared, error = shown.decode().rstrip("\r\n").split("\r")
    assert cleared.strip() == ""
    assert error == "error: no space left"
