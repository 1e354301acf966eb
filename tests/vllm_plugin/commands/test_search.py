# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress search``, and ``quantize --allocation`` with what it wrote."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from quant_methods.allocators.allocation import Allocation
from quant_methods.formats.sizes import sizes_of
from vllm_plugin.commands.search import _quantize_command

QUICK = ("--samples", 4, "--length", 32, "--search-samples", 4, "--group-size", 32)


@pytest.mark.parametrize("method", ["probe", "luq", "hessian"])
def test_search_and_quantize(
    run: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    folder = tiny_model("qwen2")
    asked = (
        folder,
        "--budget",
        6.5,
        "--target",
        "cuda",
        "--method",
        method,
        "--text",
        text,
        *QUICK,
    )
    code, output, errors = run("search", *asked, "--out", "bits.json", "--plot", "bits.png")
    assert code == 0, errors
    assert Path("bits.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per weight include scales and zero points" in output
    assert "the levels stay in" in errors
    content = json.loads(Path("bits.json").read_text())
    assert content["schema"] == "vllm-compress/allocation" and content["version"] == 1
    assert content["model"] == Checkpoint(folder).weights_digest
    assert set(content["bits"].values()) == {4, 8}
    report = content["report"]
    assert 4.625 < report["bits_per_weight"] <= 6.5
    assert report["uniform"]["8"]["kl_nats"] < report["kl_nats"] < report["uniform"]["4"]["kl_nats"]

    if method != "probe":
        return
    command = output.partition("quantize it: ")[2].strip()
    code, output, errors = run(*shlex.split(command)[1:])
    assert code == 0, errors
    written = Path(f"{folder.name}-mixed")
    found = json.loads((written / "report.json").read_text())
    assert found["bits_per_weight"] == report["bits_per_weight"]
    sizes = sizes_of(Checkpoint(written), {}, tied=False)
    assert sizes.linears == sum(
        {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}[unit.rpartition(".")[2]]
        for unit, bits in content["bits"].items()
        if bits == 4
    )

    other = tiny_model("qwen2", seed=1)
    command = ("quantize", other, "--allocation", "bits.json", "--out", "other")
    code, _, errors = run(*command, "--group-size", 32)
    assert code == 1 and "the allocation is of another model" in errors
    code, _, errors = run("quantize", folder, "--allocation", "bits.json", "--out", "other")
    assert code == 1 and "searched with group_size 32, not 128" in errors
    whole = content["bits"].copy()
    del content["bits"]["model.layers.1.down"]
    Path("bits.json").write_text(json.dumps(content))
    code, _, errors = run("quantize", folder, *command[2:], "--group-size", 32)
    assert code == 1 and "was searched, and has no bits for model.layers.1.down;" in errors
    content["bits"] = whole
    content["version"] = 2
    Path("bits.json").write_text(json.dumps(content))
    code, _, errors = run(*command)
    assert code == 1 and "bits.json.version" in errors
    assert not Path("other").exists() and not Path(".other.partial").exists()


@pytest.mark.parametrize("seed", [0, 5])
def test_the_printed_command_calibrates_on_the_same_text(seed: int) -> None:
    grid = {"group_size": 64, "symmetric": False, "eight_bit": "w8a8", "tensor_parallel": 1}
    calibration = CalibrationSettings(samples=8, length=64, seed=seed).model_dump()
    bits = {"model.layers.0.qkv": 8}
    made = Allocation(bits=bits, grid=grid, report={"calibration": calibration})
    command = _quantize_command("MODEL", Path("bits.json"), made)
    assert "--samples 8 --length 64" in command
    assert ("--seed 5" in command) is (seed == 5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--budget", 3.5, "--target", "cpu"), "is below the 4."),
        (("--budget", 4.5, "--target", "cpu", "--levels", "4,6"), "cannot serve units of 6 bits"),
        (("--budget", 4.5, "--target", "cpu", "--levels", "low"), "not a list of numbers"),
        (("--budget", 40, "--target", "cpu"), "less than or equal to 16"),
        (("--budget", 5, "--target", "cpu", "--group-size", 48), "--group-size: "),
        (("--budget", 5, "--target", "cpu", "--out", "no/bits.json"), "cannot write no/bits.json"),
    ],
)
def test_one_error_before_any_work(
    run: Callable, tiny_model: Callable[..., Path], options: tuple, error: str
) -> None:
    code, output, errors = run("search", tiny_model("qwen2"), "--out", "bits.json", *options)
    assert code == 1 and error in errors and not output
    assert not Path("bits.json").exists()
