# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress profile``: what it measures, what it writes, what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers

from compress_common.errors import CompressError
from kv_policies.budget.profile import Profile, load
from quant_methods import planning
from quant_methods.calibration import CalibrationSettings
from vllm_plugin import cli
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, attention_of, register
from vllm_plugin.commands.profiling.kv_profile import make_profile
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers

QUICK = ("--samples", "2", "--length", "48")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The light of the sun is white, and made of all colours. " * 40)
    return file


@pytest.fixture
def profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """``profile(arguments)``: exit code, output and errors of the command, run in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def profile(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-compress", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return profile


@pytest.mark.parametrize(
    ("arch", "layers", "config"),
    [
        ("llama", (0, 1), {}),
        ("qwen3", (0, 1), {}),
        ("gemma3", (1,), {"sliding_window": 16}),  # layer 0 must not see all 48 tokens
    ],
)
def test_captured_attention_is_that_of_the_dense_matrix(
    tiny_model: Callable[..., Path], arch: str, layers: tuple[int, ...], config: dict
) -> None:
    folder = tiny_model(arch, **config)
    tokens = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(1))
    register()
    auto = transformers.AutoModelForCausalLM
    captured = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
    eager = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert full_attention_layers(captured.config) == layers
    with torch.no_grad():
        dense = eager(tokens, output_attentions=True).attentions
    expected = torch.stack([dense[layer].mean(1).sum(1)[0] for layer in layers])
    found = attention_of(captured, tokens, layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.sum(1) == pytest.approx(torch.full((len(layers),), 48.0), abs=1e-3)


@pytest.mark.parametrize(("arch", "layers"), [("llama", (0, 1, 2, 3)), ("gemma3", (1, 3))])
def test_the_file_is_a_profile_of_this_model_alone(
    profile: Callable, tiny_model: Callable[..., Path], text: Path, arch: str, layers: tuple
) -> None:
    config: dict = {"num_hidden_layers": 4}
    if arch == "gemma3":
        config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    folder = tiny_model(arch, **config)
    code, output, errors = profile(folder, "--keep", 0.3, "--text", text, *QUICK, "--plot", "p.png")
    assert code == 0, errors
    file = Path(f"kv-profile-{folder.name}-0.3.json")
    assert f"--additional-config.compress.kv.profile {file}" in output
    assert "attention kept" in output
    assert ("2 layers without full attention" in output) == (arch == "gemma3")
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path().glob(".*")), "temporary files are left"

    hf_config = transformers.AutoConfig.from_pretrained(folder)
    made = load(file, fingerprint_of("served", hf_config), full_attention_layers(hf_config))
    assert made.layers == layers
    assert sum(made.fractions) / len(made.fractions) == made.keep == Fraction(3, 10)
    assert sum(made.cut().per_layer) / len(layers) == made.keep
    kept = made.provenance.attention_retained
    assert kept["profile"] >= kept["uniform"] - 0.02  # rounding down to whole tokens
    assert made.provenance.text == "text.txt"
    assert made.provenance.text_sha256

    other = transformers.AutoConfig.from_pretrained(tiny_model("qwen2"))
    with pytest.raises(CompressError, match="'Qwen2ForCausalLM' in the model"):
        load(file, fingerprint_of("other", other), full_attention_layers(other))


def test_demo_model(profile: Callable, demo_model: Path) -> None:
    # Fewer tokens would measure the rounding to whole tokens.
    arguments = ("--keep", "1/4", "--samples", 2, "--length", 128, "--levels", 5, "--json")
    shutil.copy(Path(__file__).parents[3] / "README.md", "prose.txt")
    files = ("--text", "prose.txt", "--out", "demo.json")
    code, output, errors = profile(demo_model, *arguments, *files)
    assert code == 0, errors
    printed = json.loads(output)
    made = load("demo.json")
    assert printed["profile"] == made.model_dump(mode="json", by_alias=True)
    assert len(printed["levels"]["fractions"]) == made.levels == 5
    assert len(made.fractions) == 30
    assert len(set(made.fractions)) > 5
    assert sum(made.fractions) / 30 == Fraction(1, 4)
    kept = made.provenance.attention_retained
    assert 0.5 < kept["uniform"] < kept["profile"] < 1
    assert abs(kept["levels"] - kept["profile"]) < 0.02


def test_own_text(
    profile: Callable, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, errors = profile(tiny_model("llama"), "--keep", 0.5, *QUICK, "--out", "own.json")
    assert code == 0, errors
    assert load("own.json").provenance.text == "sampled by the model itself, seed 0"
    monkeypatch.setattr(planning, "sampled_tokens", lambda *_: pytest.fail("sampled again"))
    code, _, errors = profile(tiny_model("llama"), "--keep", 0.25, *QUICK, "--out", "other.json")
    assert code == 0, errors


def test_an_interrupted_write_leaves_the_old_file(
    profile: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(self: Profile, path: Path) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    Path("old.json").write_text("old")
    monkeypatch.setattr(Profile, "save", half)
    arguments = ("--keep", 0.5, *QUICK, "--text", text, "--out", "old.json")
    code, _, errors = profile(tiny_model("llama"), *arguments)
    assert code == 130
    assert "interrupted" in errors
    assert Path("old.json").read_text() == "old"
    assert sorted(Path().iterdir()) == [Path("old.json"), Path("text.txt")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--keep", "0"), "must be in (0, 1], got 0"),
        (("--keep", "1.5"), "must be in (0, 1], got 1.5"),
        (("--keep", "much"), "must be a number"),
        (("--keep", "0.01"), "raise the length to at least 100"),
        (("--samples", "0"), "option.samples"),
        (("--length", "4000"), "exceeds the model's 2048 positions"),
        (("--text", "missing.txt"), "missing.txt is not a file"),
        (("--text", "text.txt", "--samples", "400"), "19200 are needed"),
        (("--levels", "3"), "2 layers cannot be cut into 3 levels"),
        (("--out", "missing/profile.json"), "writable folder"),
        (("--plot", "plot.xyz"), "unknown kind of file"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_one_line(
    profile: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    code, output, errors = profile(tiny_model("llama"), "--keep", "0.5", *QUICK, *arguments)
    assert code == 1
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert expected in line
    assert not output
    assert sorted(Path().iterdir()) == [Path("text.txt")]


@pytest.mark.parametrize(
    ("arch", "config", "expected"),
    [
        ("mistral", {"sliding_window": 64}, "no layer with full attention"),
        ("llama", {"kv_lora_rank": 16}, "multi-head latent attention"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("llama", {"num_kv_shared_layers": 1}, "share the KV cache"),
    ],
)
def test_unfit_models_are_refused(
    tiny_model: Callable[..., Path], arch: str, config: dict, expected: str
) -> None:
    folder = tiny_model(arch, **config)
    with pytest.raises(CompressError, match=expected):
        make_profile(str(folder), Fraction(1, 2), CalibrationSettings())


def test_other_attention_is_refused() -> None:
    sizes = {"num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    sizes |= {"hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    register()
    for kind, found in (("gemma2", "softcap"), ("bloom", "does not go through")):
        config = transformers.AutoConfig.for_model(kind, **sizes)
        network = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION
        )
        with pytest.raises(CompressError, match=found):
            attention_of(network, torch.zeros(1, 2, dtype=torch.int64), (1,))


def test_missing_model_and_missing_matplotlib(
    profile: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, errors = profile("/no/such/model", "--keep", 0.5)
    assert code == 1
    assert "does not exist" in errors
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, errors = profile("/no/such/model", "--keep", 0.5, "--plot", "p.png")
    assert code == 1
    assert "pip install 'vllm-compress-plugin[plot]'" in errors


def test_config_without_architectures_or_head_dim() -> None:
    config = transformers.GPTNeoXConfig(hidden_size=64, num_attention_heads=4)
    made = fingerprint_of("a", config)
    assert (made.architecture, made.head_dim) == ("gpt_neox", 16)
    with pytest.raises(CompressError, match="num_attention_heads is None"):
        fingerprint_of("b", transformers.MambaConfig())
