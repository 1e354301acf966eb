# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress calibrate-kv``: what it fits and what it writes."""

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress_common.calibration.text import CalibrationSettings, calibration_tokens
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.names import Names
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES
from kv_policies.latents.low_rank import relative_error
from vllm_plugin.commands.profiling.kv_bases import make_bases, weights_digest
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers

QUICK = ("--samples", "8", "--length", "64")


@pytest.fixture
def calibrate(run: Callable) -> Callable[..., tuple[int, str, str]]:
    return partial(run, "calibrate-kv")


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
    arguments = (folder, "--ratio", 0.8, "--bits", 16, "--text", text, *QUICK, "--plot", "p.png")
    code, output, errors = calibrate(*arguments, "--no-allocate", "--objective", "attention")
    assert code == 0, errors
    file = Path(f"kv-bases-{folder.name}-0.8-16bit.safetensors")
    prefix = "--additional-config.compress.kv"
    assert f"{prefix}.policy cskv {prefix}.bases {file}" in output
    assert "bytes per token, with scales: 100 of 512 in 16 bits;" in output
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
    arguments += ("--bits", 16, "--objective", "reconstruction", "--out", "demo.safetensors")
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


def test_four_bits_at_a_ratio_of_86_percent_are_the_default(
    calibrate: Callable, tiny_model: Callable[..., Path], text: Path
) -> None:
    folder = tiny_model("llama")
    code, output, errors = calibrate(folder, "--text", text, *QUICK, "--json")
    assert code == 0, errors
    printed = json.loads(output)
    assert printed["out"] == f"kv-bases-{folder.name}-0.86-4bit.safetensors"
    made = Bases.load(printed["out"])
    assert (made.bits, made.ratio) == (4, Fraction(43, 50))
    spent = [made.header.token_bytes(row) for row in made.header.layers]
    assert Fraction(3, 4) * 36 < sum(spent) / len(spent) <= Fraction(7, 50) * 4 * 64
    for row, told in zip(printed["held_out"], made.header.layers, strict=True):
        for side in SIDES:
            # As stored: fitted and unseen text lose about the same, rounding included.
            lost = getattr(told, f"{side}_error")
            assert 0 < lost < row[side]["closed_form"] < 1.5 * lost + 0.1


def test_each_rank_gets_bases_of_its_own_heads(
    calibrate: Callable, tiny_model: Callable[..., Path], text: Path
) -> None:
    folder = tiny_model("llama")
    arguments = (folder, "--text", text, *QUICK, "--bits", 16, "--ratio", 0.75)
    code, output, errors = calibrate(*arguments, "--tensor-parallel-size", 2)
    assert code == 0, errors
    file = Path(f"kv-bases-{folder.name}-0.75-16bit-tp2.safetensors")
    assert f"{file} --tensor-parallel-size 2" in output
    assert "bytes per token on each of 2 ranks, with scales: " in output
    made = Bases.load(file)
    assert made.header.tensor_parallel == 2 and made.header.features == 32
    factors = [made.factor(0, "key", shard) for shard in range(2)]
    assert all(factor.encode.shape == (32, made.ranks(0)[0]) for factor in factors)
    assert not torch.equal(*(factor.encode for factor in factors))
    code, _, errors = calibrate(*arguments, "--tensor-parallel", 3)
    assert (
        code == 1 and "cannot be split evenly over 3 ranks" in errors and "allowed: 1, 2" in errors
    )


def test_own_text_and_no_saving(calibrate: Callable, tiny_model: Callable[..., Path]) -> None:
    whole = ("--ratio", 0, "--bits", 16)
    code, _, errors = calibrate(tiny_model("llama"), *whole, *QUICK, "--out", "own")
    assert code == 0, errors
    made = Bases.load("own")
    assert made.header.calibration.text == "sampled by the model itself, seed 0"
    assert made.ranks(0) == (64, 64) and made.header.layers[0].key_error == 0


def test_unknown_architectures_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    with pytest.raises(CompressError, match="models of type gemma, .*qwen3, this one is olmo2"):
        make_bases(str(tmp_path), Fraction(1, 2), CalibrationSettings())


def test_weights_that_are_not_there() -> None:
    class Empty:
        files: dict = {}
        folder, names = Path("here"), Names()

    with pytest.raises(CompressError, match="here has no weight model.layers.0.self_attn.k_proj"):
        weights_digest(Empty(), "model.layers", 2)  # type: ignore[arg-type]
