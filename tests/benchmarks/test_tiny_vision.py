# SPDX-License-Identifier: Apache-2.0
"""The committed tiny LLaVA is what its ``training.json`` says, and the script can make another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from benchmarks import tiny_vision
from benchmarks.kv_vision import chat
from benchmarks.tiny_vision import ANSWER, BOS, CELL, COLON, EOS, IMAGE, SIDES
from benchmarks.vision_grids import CELLS, DIGITS, FILLED, PATCH, SIDE, grid


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(tiny_vision.folder())


def test_committed_model_is_as_accurate_as_recorded() -> None:
    recorded = json.loads((tiny_vision.folder() / "training.json").read_text())["accuracy"]
    found = tiny_vision.accuracy(tiny_vision.load(tiny_vision.folder()), pictures=8, seed=2)
    assert recorded >= 0.9
    assert found == pytest.approx(recorded, abs=0.06)  # 256 questions
    sizes = sum(file.stat().st_size for file in tiny_vision.folder().iterdir())
    assert sizes < 4_000_000


@torch.no_grad()
def test_what_was_trained_is_what_transformers_computes(processor: Any) -> None:
    """Of a whole picture, prepared by the processor, from the chat template on."""
    model, given = tiny_vision.load(tiny_vision.folder()), grid(3)
    content = [{"type": "image"}, {"type": "text", "text": " ".join(given.cells[:2])}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(given.image, text, return_tensors="pt", add_special_tokens=False)
    pixels = tiny_vision.normalized(np.asarray(given.image)[None])
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=1e-5)
    asked = [CELL + CELLS.index(cell) for cell in given.cells[:2]]
    ids = [BOS, *[IMAGE] * SIDE**2, *asked, COLON]
    assert inputs["input_ids"].tolist() == [ids]
    digits = [ANSWER + DIGITS.index(answer) for answer in given.answers[:2]]
    tokens = torch.tensor([[*ids, asked[0], digits[0], asked[1], digits[1]]])
    places = torch.arange(SIDE**2)[None]
    ours = tiny_vision.logits(model, tiny_vision.Batch(pixels, places, tokens, tokens))
    theirs = model(**(inputs | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}))
    torch.testing.assert_close(ours, theirs.logits[:, -7:], atol=1e-4, rtol=1e-4)
    assert ours[0, 2:].argmax(-1).tolist() == [asked[0], digits[0], asked[1], digits[1], EOS]


@pytest.mark.parametrize("side", SIDES)
def test_smaller_pictures_ask_for_cells_that_they_show(side: int) -> None:
    given = tiny_vision.batch(side, 512, np.random.default_rng(0))
    count, cells = len(given.pixels), side * side
    assert given.pixels.shape == (count, 3, side * PATCH, side * PATCH)
    assert given.places.shape == (count, cells)
    assert torch.equal(given.places, given.places.sort(1).values)
    text = given.tokens[:, 1 + cells :]
    assert text.shape == given.labels.shape
    for places, words, labels in zip(given.places, text.tolist(), given.labels, strict=True):
        listed = words.index(COLON)
        asked = words[listed + 1 :: 2]
        assert words[:listed] == asked[:listed] and len(set(asked)) == len(asked)
        assert {cell - CELL for cell in asked} <= set(places.tolist())
        answers = words[listed + 2 :: 2]
        assert all(ANSWER <= answer < ANSWER + 10 for answer in answers)
        assert labels[listed + 1 :: 2].tolist() == answers
        follow = [*asked[:listed], *[EOS] * (1 + len(asked) - listed)]
        assert labels[listed::2].tolist() == follow
        assert labels[:listed].tolist() == [-100] * listed


def test_a_picture_is_repeatable_and_says_what_is_asked() -> None:
    given, again = grid(5), grid(5)
    assert np.array_equal(np.asarray(given.image), np.asarray(again.image))
    assert len(set(given.cells)) == FILLED == len(given.answers)
    assert given.cells == again.cells and grid(6).answers != given.answers
    bright = np.asarray(given.image).reshape(SIDE, PATCH, SIDE, PATCH, 3).max((1, 3, 4)) >= 128
    assert {CELLS[cell] for cell in bright.flatten().nonzero()[0]} == set(given.cells)
    assert chat(5, 2)["messages"][0]["content"][1]["text"] == " ".join(given.cells[:2])


def test_training_writes_a_folder_that_loads(tmp_path: Path) -> None:
    how = tiny_vision.Training(minutes=2 / 60, tokens=64)
    model, steps, since = tiny_vision.train(how)
    tiny_vision.write(model, tmp_path, {"steps": steps})
    again = tiny_vision.load(tmp_path)
    assert steps > 1 and since[0] == 0
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert len(weights) == len(model.state_dict())
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.bos_token_id == BOS
