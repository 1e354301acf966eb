# SPDX-License-Identifier: Apache-2.0
"""What `vllm-compress` makes of a wrong command line, and what its help costs."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import typer

from compress_common.errors import CompressError
from vllm_plugin import cli
from vllm_plugin.commands.common import check_text

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantize M", "Missing option '--out' (see `vllm-compress quantize --help`)"),
        ("quantize M --outt x", "No such option: --outt; did you mean '--out'?"),
        ("--versionx", "No such option: --versionx; did you mean '--version'?"),
        ("quantise M", "No such command 'quantise'. Did you mean 'quantize'?"),
        ("nothing-like-it", "No such command 'nothing-like-it'"),
        ("quantize M --out x --samples ten", "Invalid value for '--samples'"),
        ("plan M --gpu-memory 1GiB --context 4k --packing x", "'--packing': 'x' is not one of"),
        ("quantize M --out", "Option '--out' requires an argument"),
        ("doctor M extra", "unexpected extra argument"),
        ("methods --policy", "No such option: --policy"),
    ],
)
def test_a_usage_error_is_one_line(run: Callable, line: str, expected: str) -> None:
    code, out, err = run(*line.split())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


def test_a_traceback_is_shown_on_request(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm-compress", "quantize", "M", "--debug"])
    with pytest.raises(Exception, match="Missing option '--out'"):
        cli.main()


def test_a_module_that_cannot_be_imported_is_one_line(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where vLLM moved one, or a folder of the user hides a package of ours."""
    monkeypatch.setitem(sys.modules, "quant_methods.registry", None)
    code, out, err = run("methods")
    assert (code, out) == (1, "")
    assert err.startswith("error: ModuleNotFoundError: import of quant_methods.registry halted")
    assert err.count("\n") == 1
    with pytest.raises(ImportError):
        run("methods", "--debug")


def test_without_a_command_the_help_is_shown(run: Callable) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert all(name in out for name in COMMANDS)


def test_version(run: Callable) -> None:
    code, out, _ = run("--version")
    assert code == 0
    plugin, torch = version("vllm-compress-plugin"), version("torch")
    assert out.startswith(f"vllm-compress-plugin {plugin}, vLLM {version('vllm')}")
    assert f"torch {torch}" in out


def without_large_imports(lines: list[list[str]], code: int) -> tuple[list[str], str]:
    """What command lines print, and the errors, of a process in which nothing large is imported."""
    script = """if True:
        import json, sys
        from vllm_plugin import cli
        code, lines = json.loads(sys.argv.pop())
        for line in lines:
            sys.argv[1:] = line
            try:
                cli.main()
            except SystemExit as end:
                assert (end.code or 0) == code, line
        large = ("torch", "transformers", "vllm", "numpy", "ray", "matplotlib", "huggingface_hub")
        print([name for name in large if name in sys.modules])
    """
    command = [sys.executable, "-c", script, json.dumps([code, lines])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed.pop() == "[]"
    return printed, done.stderr


def test_help_imports_nothing_large() -> None:
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    printed, _ = without_large_imports(lines, 0)
    assert sum("Usage: " in line for line in printed) == 1 + len(COMMANDS)


def test_mistakes_that_need_no_model_import_nothing_large() -> None:
    """These imports take seconds, which a wrong path or number is not worth."""
    lines = [
        "quantize ./nowhere --out x --set alpha --calibration nowhere.txt",
        "search ./nowhere --out x --budget 4 --target cpu --levels low",
        "profile ./nowhere --keep 1.5 --text nowhere.txt",
        "calibrate-kv ./nowhere --out no/where",
        "plan ./nowhere --gpu-memory 24 --context 4k --prompt 5k",
        "recommend ./nowhere --gpu-memory 24 --context 4k --text nowhere.txt",
        "eval ./nowhere ./nowhere@rtn --text nowhere.txt",
        "eval-kv ./nowhere --kv snap_kv,0.5 --engine-args {",
        "status --json --watch 5",
    ]
    printed, errors = without_large_imports([line.split() for line in lines], 1)
    assert not printed
    assert errors.count("error: ") == len(lines)
    assert errors.count("./nowhere does not exist") == len(lines)  # `eval` names it twice


def test_a_text_is_looked_for_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands the home folder in `--text=~/book.txt`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CompressError, match="is not a file"):
        check_text("~/book.txt")
    (tmp_path / "book.txt").write_text("a")
    check_text("~/book.txt")


def test_what_signatures_repeat_is_what_the_packages_say() -> None:
    from compress_common.calibration.text import SELF
    from quant_methods.formats import checkpoint_formats, sizes
    from vllm_plugin.commands import common, plan, quantize

    assert common.SELF == SELF
    assert get_args(plan.Packing) == get_args(sizes.Packing)
    listed = inspect.getsource(quantize.quantize)
    assert f"checkpoint format: {', '.join(checkpoint_formats.FORMATS)}" in listed


def test_a_first_profile_takes_minutes() -> None:
    """Sampling 10 x 1,024 tokens of a large model takes hours on two cores, and buys little."""
    from vllm_plugin.commands.profile import LENGTH, profile

    default = {name: p.default for name, p in inspect.signature(profile).parameters.items()}
    assert default["length"] is None and default["samples"] * LENGTH <= 2048


@pytest.mark.parametrize(
    ("words", "expected"),
    [("vllm-compress cal", "calibrate-kv"), ("vllm-compress plan M --gpu-memory-", "utilization")],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    environment = {"_VLLM_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_plugin.cli"],
        env=os.environ | environment | {"COMP_CWORD": str(len(words.split()) - 1)},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout, done.stderr
