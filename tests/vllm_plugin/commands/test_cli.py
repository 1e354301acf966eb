# SPDX-License-Identifier: Apache-2.0
"""``quantize``, ``methods`` and ``eval`` as users run them."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from compress_common.errors import CompressError
from quant_methods.allocators.registry import allocators
from vllm_plugin import cli

COMMAND = (sys.executable, "-m", "vllm_plugin.cli")
QUICK = ("--samples", "2", "--length", "16", "--group-size", "64")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))


def test_quantize_prints_a_table(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As users run it, in a process of its own."""
    done = subprocess.run(
        [
            *COMMAND,
            "quantize",
            tiny_model("llama"),
            "--out",
            tmp_path / "a",
            *QUICK,
            "--set",
            "rounding=nearest",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "needs about" in done.stderr
    assert "smoothquant_plus (compressed-tensors)" in done.stdout
    assert "KL, nats per token" in done.stdout


def test_quantize_prints_json(run: Callable, tiny_model: Callable[..., Path]) -> None:
    arguments = ("--out", "int4", *QUICK, "--set", "alpha=0.5", "--seed", "3", "--json")
    code, output, errors = run("quantize", tiny_model("llama"), *arguments)
    assert code == 0, errors
    report = json.loads(output)
    assert report["alpha"] == 0.5
    assert report["settings"]["group_size"] == 64
    assert report["calibration"]["seed"] == 3


def test_bits_that_no_cpu_serves_are_told_before_the_work(
    run: Callable, tiny_model: Callable[..., Path]
) -> None:
    model, quick = tiny_model("llama"), ("--method", "rtn", "--group-size", "32")
    code, output, errors = run("quantize", model, "--out", "5", *quick, "--bits", "5")
    assert code == 0 and "No CPU serves these weights (5 bits)" in errors
    code, output, errors = run("quantize", model, "--out", "3", *quick, "--bits", "3")
    assert code == 0 and "No CPU" not in errors
    code, _, errors = run("quantize", model, "--out", "3", *quick, "--bits", "9")
    assert code == 2 and "less than or equal to 8" in errors
    code, _, errors = run("quantize", model, "--out", "3", *quick)
    assert code == 1 and errors.strip() == "error: 3 exists; give another folder or remove it"


def test_a_method_keeps_its_own_defaults(run: Callable, tiny_model: Callable[..., Path]) -> None:
    """Options that were not given leave them alone: fireq is symmetric, and takes nothing else."""
    model, quick = tiny_model("llama"), ("--samples", "2", "--length", "16", "--json")
    arguments = ("--method", "rsq", "--bits", "3", "--group-size", "32")
    code, output, errors = run("quantize", model, "--out", "3", *arguments, *quick)
    assert code == 0, errors
    report = json.loads(output)
    assert report["method"] == "rsq"
    assert report["settings"]["token_weights"] == "attention"
    assert report["bits_per_weight"] == pytest.approx(3 + 19 / 32, abs=1e-3)
    code, output, errors = run("quantize", model, "--out", "fp8", "--method", "fireq", *quick)
    assert code == 0, errors
    assert json.loads(output)["settings"]["symmetric"]
    code, _, errors = run("quantize", model, "--out", "b", "--method", "fireq", "--format", "awq")
    assert code == 1
    assert "not 4 bits in groups of 128 with fp8 activations" in errors


def test_methods_and_help(run: Callable) -> None:
    rows = json.loads(run("methods", "--json")[1])
    assert rows["weights"]["smoothquant_plus"]["at_load"]
    assert rows["weights"]["smoothquant_plus"]["settings"]["alpha"]["default"] is None
    assert rows["depth"]["search"]["auto"]["settings"]["far"]["default"] > 1
    assert {"refit", "linear", "fusegpt", "none"} <= rows["depth"]["heal"].keys()
    assert rows["kv"]["prefix_kv"]["needs_profile"]
    assert rows["kv"]["snap_kv"]["settings"]["window"]["default"] == 16
    assert rows["allocators"].keys() == allocators().keys()
    assert rows["allocators"]["evopress"]["settings"]["generations"]["default"] == 50
    assert rows["allocators"]["evopress"]["search_tokens"] == 2048
    assert "backward pass" in rows["allocators"]["hessian"]["needs"]
    _, table, _ = run("methods")
    assert "vllm-compress search MODEL --method NAME" in table and "generations=50" in table
    assert "alpha" in table
    assert "snap_kv" in table
    _, help_text, _ = run("quantize", "--help")
    assert "Example" in help_text
    assert "--calibration" in help_text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "alpha=7"), "alpha"),
        (("--set", "alpha_=0.5"), "did you mean 'alpha'"),
        (("--set", "alpha"), "is not KEY=VALUE"),
        (("--method", "smothquant"), "did you mean 'smoothquant_plus'"),
        (("--format", "gguf"), "valid: compressed-tensors, awq"),
        (("--calibration", "/no/such.txt"), "is not a file"),
        (("--samples", "0"), "samples"),
        (("--calibration", "text.txt", "--seed", "1"), "the source is a file; remove one"),
        (("--group-size", "48"), "group_size"),
        (("--device", "cuda:99"), "the device cuda:99 cannot be used"),
    ],
)
def test_bad_options_are_one_message(
    run: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    code, output, errors = run("quantize", tiny_model("llama"), "--out", "out", *arguments)
    assert code != 0
    assert expected in errors
    assert "Traceback" not in errors + output
    assert not Path("out").exists()


def test_debug_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that Python shows the traceback."""
    line = ["quantize", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), "--debug"]
    monkeypatch.setattr(sys, "argv", ["vllm-compress", *line])
    with pytest.raises(CompressError, match="does not exist"):
        cli.main()


def test_interrupt_leaves_no_target(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C when it has begun to write. A signal from outside could come too late."""
    script = """if True:
        import signal, sys
        from vllm_plugin.cli import main
        def interrupt(event, arguments):
            if event == "open" and str(arguments[0]).endswith("state.json"):
                signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        sys.addaudithook(interrupt)
        main()
    """
    command = [sys.executable, "-c", script, "quantize", tiny_model("llama"), "--method", "rtn"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 130, done.stderr
    assert (tmp_path / ".out.partial").exists()
    assert "interrupted; run the same command again to continue" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_sigterm_counts_as_an_interruption() -> None:
    """Processes that a command has started end with it, as after Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "vllm_plugin.cli", "status", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = silent.accept()
            connection.recv(1)
            process.terminate()
            _, told = process.communicate(timeout=60)
    connection.close()
    assert process.returncode == 130 and told == "interrupted\n"


def test_eval_compares_models(run: Callable, tiny_model: Callable[..., Path]) -> None:
    model, text = tiny_model("llama"), Path("traffic.jsonl")
    documents = [f"The light of sun number {n} is white. " * 4 for n in range(10)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    engine = {"enforce_eager": True, "gpu_memory_utilization": 0.2}
    engine["kv_cache_memory_bytes"] = 1 << 27
    code, output, errors = run(
        *("eval", model, f"{model}@rtn", "--text", text, "--windows", 2, "--length", 32),
        *("--batch", 2, "--engine-args", json.dumps(engine), "--json"),
    )
    assert code == 0, errors
    first, second = json.loads(output)
    assert first["nats_difference"] == 0
    assert second["standard_error"] > 0
    assert second["nats"] == pytest.approx(first["nats"] + second["nats_difference"])
    _, _, errors = run("eval", model, "--text", text, "--windows", 2000)
    assert "give a longer text" in errors
    text.write_text("not JSON")
    _, _, errors = run("eval", model, "--text", text)
    assert "traffic.jsonl:1 is not JSON" in errors


def test_eval_names_models_at_80_columns() -> None:
    from vllm_plugin.commands.evaluate import comparison
    from vllm_plugin.commands.evaluation import Evaluation

    figures = (2.5, 12.182, 0.175, 0.009, 150 << 30, 142 << 30, 23456.0, 1234.5)
    long = "meta-llama/Llama-3.3-70B-Instruct"
    rows = [Evaluation(f"{long}@{method}", *figures) for method in ("rtn", "smoothquant_plus")]
    console = Console(width=80, file=io.StringIO())
    console.print(comparison(rows))
    lines = [line for line in console.file.getvalue().splitlines() if "#" in line]  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines] == ["perplexity", "#1", "#2"]
    for line in lines[1:]:
        assert "12.182" in line and "+0.1750 ± 0.0090" in line and line.rstrip().endswith("1234.5")


def test_the_error_of_eval_is_that_of_windows() -> None:
    """Tokens of a window that all shift together are one observation."""
    from vllm_plugin.commands.judging.figures import paired

    base = [[1.0, 2.0, 3.0, 4.0]] * 3
    shifted = [[value + shift for value in base[0]] for shift in (0.1, 0.2, 0.6)]
    difference, error = paired(shifted, base)
    assert difference == pytest.approx(0.3)
    assert error == pytest.approx((0.07 / 3) ** 0.5)  # variance (0.04 + 0.01 + 0.09) / 2
    assert paired(base, base) == (0, 0)
    assert paired(base[:1], base[:1]) == (0, None)
