# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress profile``: what it measures and what it writes."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from compress_common.calibration import texts
from compress_common.errors import CompressError
from kv_policies.budget.profile import load
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, attention_of, register
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers

QUICK = ("--samples", "2", "--length", "48")


@pytest.fixture
def profile(run: Callable) -> Callable[..., tuple[int, str, str]]:
    return partial(run, "profile")


@pytest.mark.parametrize(
    ("arch", "layers", "config"),
    [
        ("llama", (0, 1), {}),
        ("qwen3", (0, 1), {}),
        ("gemma3", (1,), {"sliding_window": 16}),  # layer 0 must not see all 48 tokens
        ("gpt_oss", (1,), {"sliding_window": 16}),  # sinks, in both layers
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
    found = attention_of(captured, {"input_ids": tokens}, layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = found.sum(1) == pytest.approx(torch.full((len(layers),), 48.0), abs=1e-3)
    assert whole == (arch != "gpt_oss")


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
    monkeypatch.setattr(texts, "sampled_tokens", lambda *_: pytest.fail("sampled again"))
    code, _, errors = profile(tiny_model("llama"), "--keep", 0.25, *QUICK, "--out", "other.json")
    assert code == 0, errors


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
            attention_of(network, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, (1,))


def test_config_without_architectures_or_head_dim() -> None:
    config = transformers.GPTNeoXConfig(hidden_size=64, num_attention_heads=4)
    made = fingerprint_of("a", config)
    assert (made.architecture, made.head_dim) == ("gpt_neox", 16)
    with pytest.raises(CompressError, match="num_attention_heads is None"):
        fingerprint_of("b", transformers.MambaConfig())
