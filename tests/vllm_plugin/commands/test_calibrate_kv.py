# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress calibrate-kv``: what it fits, what it writes, what it refuses."""

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress_common.errors import CompressError
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES
from kv_policies.latents.low_rank import relative_error
from quant_methods.calibration import CalibrationSettings, calibration_tokens
from quant_methods.checkpoint import Checkpoint
from tests.support.generate import ROOT
from vllm_plugin import cli
from vllm_plugin.commands.profiling.kv_bases import make_bases, weights_digest
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers

QUICK = ("--samples", "8", "--length", "64")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"))
    return file


@pytest.fixture
def calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """``calibrate(arguments)``: exit code, output and errors of the command in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def calibrate(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-compress", "calibrate-kv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return calibrate


def states_of(folder: Path, tokens: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Keys before RoPE and values of a whole run of the model, [N, F], as modules return them."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, side: str) -> Callable:
        def hook(module: Any, _: Any, output: torch.Tensor) -> None:
            if output.ndim == 4 and output.shape[2] == tokens.shape[1]:  # heads first, in Gemma
                output = output.transpose(1, 2)
            found[layer, side] = output.reshape(tokens.numel(), -1).double()

        return hook

    for index, layer in enumerate(network.model.layers):
        attention = layer.self_attn
        keys = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        keys.register_forward_hook(keep(index, "key"))
        attention.v_proj.register_forward_hook(keep(index, "value"))
    with torch.no_grad():
        network.model(tokens)
    return found


@pytest.mark.parametrize("objective", ["reconstruction", "attention"])
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", {"num_key_value_heads": 4}),  # as many as queries
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        (
            "gemma3",
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        ),
    ],
)
def test_errors_are_those_of_captured_states(
    tiny_model: Callable[..., Path], text: Path, arch: str, config: dict, objective: Any
) -> None:
    folder = tiny_model(arch, **config)
    settings = CalibrationSettings(source=str(text), samples=8, length=64)
    bases, report = make_bases(str(folder), Fraction(3, 4), settings, objective=objective)
    auto = transformers.AutoConfig.from_pretrained(folder)
    assert bases.layers == full_attention_layers(auto) == tuple(row.layer for row in report)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = calibration_tokens(settings, network, tokenizer)
    fitted, held_out = states_of(folder, tokens[:6]), states_of(folder, tokens[6:])
    for row, layer in zip(report, bases.header.layers, strict=True):
        for side in SIDES:
            errors, factor = getattr(row, side), bases.factor(row.layer, side)
            assert errors["closed_form"] < errors["asvd"] and errors["closed_form"] < errors["svd"]
            if objective == "attention":  # errors are in its own metric
                continue
            lost = getattr(layer, f"{side}_error")
            for states, expected in ((fitted, lost), (held_out, errors["closed_form"])):
                exact = states[row.layer, side]
                found = relative_error(exact, factor.project(exact.float()).double())
                assert found == pytest.approx(expected, rel=0.02)


def test_the_file_is_of_this_model_alone(
    calibrate: Callable, tiny_model: Callable[..., Path], text: Path
) -> None:
    folder = tiny_model("qwen2")
    arguments = (folder, "--ratio", 0.8, "--text", text, *QUICK, "--plot", "p.png")
    code, output, errors = calibrate(*arguments, "--no-allocate", "--objective", "attention")
    assert code == 0, errors
    file = Path(f"kv-bases-{folder.name}-0.8.safetensors")
    prefix = "--additional-config.compress.kv"
    assert f"{prefix}.policy cskv {prefix}.bases {file}" in output
    assert "bytes per token in 16 bits: 100 of 512;" in output
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path().glob(".*")), "temporary files are left"

    config = transformers.AutoConfig.from_pretrained(folder)
    digest = weights_digest(Checkpoint(folder), "model.layers", 2)
    made = Bases.load(file, fingerprint_of("served", config), weights=digest)
    assert made.header.objective == "attention" and made.header.calibration.text == "text.txt"
    assert [sum(made.ranks(layer)) for layer in made.layers] == [25, 25]
    for seed, arch in ((1, "qwen2"), (0, "llama")):
        other = tiny_model(arch, seed=seed)
        model = fingerprint_of("other", transformers.AutoConfig.from_pretrained(other))
        digest = weights_digest(Checkpoint(other), "model.layers", 2)
        with pytest.raises(CompressError, match="made for .*, not for other"):
            Bases.load(file, model, weights=digest)


def test_demo_model(calibrate: Callable, demo_model: Path, text: Path) -> None:
    arguments = (demo_model, "--ratio", "1/2", "--text", text, "--samples", 8, "--length", 128)
    arguments += ("--objective", "reconstruction", "--out", "demo.safetensors")
    code, output, errors = calibrate(*arguments, "--json")
    assert code == 0, errors
    printed, made = json.loads(output), Bases.load("demo.safetensors")
    assert printed["bases"] == made.header.model_dump(mode="json", by_alias=True)
    assert made.layers == tuple(range(30))
    totals = [sum(made.ranks(layer)) for layer in made.layers]
    assert 180 < sum(totals) / 30 <= 193 and 2 < len(set(totals)) <= 6
    assert sum(made.ranks(layer)[0] for layer in made.layers) < sum(totals) / 2
    for row in printed["held_out"]:
        for side in SIDES:
            errors = row[side]
            assert errors["closed_form"] < errors["asvd"] < errors["svd"] + 0.05
    mean = sum(row["key"]["closed_form"] for row in printed["held_out"]) / 30
    assert 0.02 < mean < 0.2


def test_own_text_and_no_saving(calibrate: Callable, tiny_model: Callable[..., Path]) -> None:
    code, _, errors = calibrate(tiny_model("llama"), "--ratio", 0, *QUICK, "--out", "own")
    assert code == 0, errors
    made = Bases.load("own")
    assert made.header.calibration.text == "sampled by the model itself, seed 0"
    assert made.ranks(0) == (64, 64) and made.header.layers[0].key_error == 0


def test_an_interrupted_write_leaves_the_old_file(
    calibrate: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(self: Bases, path: Path) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    Path("old").write_text("old")
    monkeypatch.setattr(Bases, "save", half)
    code, _, errors = calibrate(
        tiny_model("llama"), "--ratio", 0.5, *QUICK, "--text", text, "--out", "old"
    )
    assert code == 130
    assert "interrupted" in errors
    assert Path("old").read_text() == "old"
    assert sorted(Path().iterdir()) == [Path("old"), Path("text.txt")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--ratio", "1"), "a number in [0, 1), got 1"),
        (("--ratio", "much"), "a number in [0, 1), got much"),
        (("--method", "snap_kv"), "allowed: cskv"),
        (("--objective", "beauty"), "allowed: reconstruction, attention"),
        (("--samples", "3"), "3 samples are too few"),
        (("--samples", "0"), "option.samples"),
        (("--samples", "4", "--length", "16"), "48 tokens cannot tell 64 features apart"),
        (("--length", "4000"), "exceeds the model's 2048 positions"),
        (("--text", "missing.txt"), "missing.txt is not a file"),
        (("--samples", "400"), "25600 are needed"),
        (("--out", "missing/bases"), "writable folder"),
        (("--plot", "plot.xyz"), "unknown kind of file"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_one_line(
    calibrate: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    given = (tiny_model("llama"), "--ratio", "0.5", "--text", text, *QUICK, *arguments)
    code, output, errors = calibrate(*given)
    assert code == 1
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert expected in line
    assert not output
    assert sorted(Path().iterdir()) == [Path("text.txt")]


def test_all_bad_options_are_listed(calibrate: Callable) -> None:
    wrong = ("--ratio", "2", "--method", "prefix_kv", "--objective", "beauty")
    code, _, errors = calibrate("/no/such/model", *wrong)
    assert code == 1
    assert "3 problems" in errors
    code, _, errors = calibrate(
        "/no/such/model", "--ratio", "0.5", "--out", "a/b", "--plot", "c/d.png"
    )
    assert "2 problems" in errors and "a/b" in errors and "c/d.png" in errors
    code, _, errors = calibrate("/no/such/model", "--ratio", "0.5")
    assert code == 1
    assert "does not exist" in errors


@pytest.mark.parametrize(
    ("arch", "config", "expected"),
    [
        ("mistral", {"sliding_window": 64}, "no layer with full attention"),
        ("llama", {"kv_lora_rank": 16}, "multi-head latent attention"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("llama", {"num_kv_shared_layers": 1}, "share the KV cache"),
        ("llama", {"attn_logit_softcapping": 50.0}, "caps its attention scores"),
    ],
)
def test_unfit_models_are_refused(
    tiny_model: Callable[..., Path], arch: str, config: dict, expected: str
) -> None:
    folder = tiny_model(arch, **config)
    with pytest.raises(CompressError, match=expected):
        make_bases(str(folder), Fraction(1, 2), CalibrationSettings())


def test_unknown_architectures_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    with pytest.raises(CompressError, match="'olmo2' is not supported; supported: gemma, .*qwen3"):
        make_bases(str(tmp_path), Fraction(1, 2), CalibrationSettings())


def test_weights_that_are_not_there() -> None:
    class Empty:
        files: dict = {}
        folder = Path("here")

    with pytest.raises(CompressError, match="here has no weight model.layers.0.self_attn.k_proj"):
        weights_digest(Empty(), "model.layers", 2)  # type: ignore[arg-type]
