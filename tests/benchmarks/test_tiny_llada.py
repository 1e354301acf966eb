# SPDX-License-Identifier: Apache-2.0
"""The committed tiny LLaDA is what its ``training.json`` says, and the script can make another."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import tiny_llada
from benchmarks.tiny_llada import ANSWER, BOS, EOS, EQUALS, TASKS, VOCABULARY
from dllm_denoising.dense import Shape


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llada.folder())


@pytest.mark.parametrize("task", TASKS)
def test_committed_model_is_as_accurate_as_recorded(task: str):
    model = tiny_llada.load(tiny_llada.folder())
    training = json.loads((tiny_llada.folder() / "training.json").read_text())
    recorded = training["accuracy"][task][str(ANSWER)]["tokens"]
    found = tiny_llada.accuracy(model, task, ANSWER, count=8, seed=2)["tokens"]
    assert recorded >= 0.95
    assert found == pytest.approx(recorded, abs=0.05)


def test_prompts_are_repeatable_and_right():
    (prompt, answer), *_ = asked = tiny_llada.prompts("sums", 3, 40, seed=5)
    assert asked == tiny_llada.prompts("sums", 3, 40, seed=5)
    digits = prompt[2:-1]
    assert prompt == [BOS, TASKS["sums"], *digits, EQUALS] and len(digits) == 40
    kept = digits[-ANSWER:]
    assert answer == [*(sum(kept[: n + 1]) % 10 for n in range(ANSWER)), EOS]
    [(prompt, answer)] = tiny_llada.prompts("copy", 1, 64, seed=5)
    assert answer == [*prompt[2:-1][-ANSWER:], EOS]
    with pytest.raises(ValueError, match="31 digits"):
        tiny_llada.prompts("sums", 1, ANSWER - 1, seed=5)


def test_text_and_chat_have_the_ids_of_prompts(tokenizer: PreTrainedTokenizerFast):
    ids = [BOS, TASKS["sums"], 3, 1, 4, 1, EQUALS]
    assert tokenizer("sums 3 1 4 1 =")["input_ids"] == ids
    assert tokenizer("sums 3141=")["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sums 3 1 4 1 ="
    assert tokenizer.decode([3, 4, 8, EOS, EOS], skip_special_tokens=True) == "3 4 8"
    for content in ("sums 3 1 4 1", " sums 3 1 4 1 ="):
        earlier = [{"role": "user", "content": "copy 2"}, {"role": "assistant", "content": "2"}]
        chat = [*earlier, {"role": "user", "content": content}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        assert found["input_ids"] == ids


def test_tokenizer_and_config_agree(tokenizer: PreTrainedTokenizerFast):
    config = json.loads((tiny_llada.folder() / "config.json").read_text())
    for name in ("bos", "eos", "pad", "mask"):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"]
    assert len(tokenizer) == config["vocab_size"] == VOCABULARY


def test_training_writes_a_folder_that_loads(tmp_path: Path):
    shape = Shape(32, 1, 1, 1, 32, VOCABULARY)
    model, steps = tiny_llada.train(shape, tiny_llada.Training(minutes=2 / 60, tokens=256))
    tiny_llada.write(model, tmp_path, {"steps": steps})
    again = tiny_llada.load(tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 20))
    assert steps > 1
    assert torch.equal(again(tokens), model(tokens))
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == tiny_llada.MASK
