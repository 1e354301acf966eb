# SPDX-License-Identifier: Apache-2.0
"""Train a tiny LLaVA that reads digits off a grid, for tests and benchmarks of KV caches.

It is asked "c7 k2 :" about a picture of 16 x 16 cells and answers "c7 four k2 two": see
``vision_grids``. A cell of a picture is one token, so what is evicted cannot be read any more. Up
to four cells can be asked for in a prompt, and others behind the answer: "a9" is followed by its
digit. ``training.json`` in the folder tells how the model was made and how accurate it is.

Pictures begin with one cell and grow as soon as the model reads them. A smaller one has some of the
rows and columns of a whole one, with the same positions, so that all of them are learned from the
first step on. Ten minutes on one core::

    OMP_NUM_THREADS=1 python -m benchmarks.tiny_vision --out FOLDER

A second run gives a model as good, not the same one: the time decides how many steps there are.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.common import ROOT
from benchmarks.training import adam, clock, descend
from benchmarks.vision_grids import CELLS, DIGITS, EMPTY, FILLED, PATCH, SIDE, drawn, filled

# Token ids. Answers and the names of cells follow; the rest is spare.
PAD, BOS, EOS, UNKNOWN, IMAGE, COLON = range(6)
ANSWER, CELL = 6, 16
VOCABULARY = 320
SPECIAL = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
LONGEST = 1024  # tokens that the model has positions for

SIDES = (1, 2, 3, 4, 6, 8, 11, SIDE)  # of pictures, as learned
LISTED = 4  # most cells that a prompt asks for
ASKED = 32  # most cells that are asked for in a prompt and behind the answer
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages if message['role'] == 'user' %}"
    "{% if message['content'] is string %} {{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
)


def folder() -> Path:
    """Where the committed model is."""
    return ROOT / "tests" / "fixtures" / "tiny_vision"


@dataclass(frozen=True)
class Training:
    """How to train."""

    minutes: float = 10.0
    seed: int = 0
    tokens: int = 1536  # of a batch
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: float = 0.01  # until this share of the time the learning rate grows
    decay: float = 0.6  # from this share on it falls
    read: float = 0.9  # share of right answers from which on pictures grow


def config() -> Any:
    """The config of a model that fits the pictures: a CLIP tower of which one layer is used."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST,
        # Half of the channels hardly turn in a picture: cells are found by what they hold.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=SIDE * SIDE,
        tie_word_embeddings=False,
    )


def fresh(seed: int) -> Any:
    """A model of random weights, in which cells have random codes of their rows and columns.

    Positions of a picture and names of cells have other codes: which belong together is learned.
    """
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.9 * weight[0].numel() ** -0.5)
        words = model.get_input_embeddings().weight.normal_(std=0.5)
        words[CELL : CELL + SIDE**2] = 0.5 * _codes(words.shape[1])
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions[1:] = _codes(positions.shape[1])
    return model


def _codes(size: int) -> torch.Tensor:
    """Random numbers for each cell of a whole picture, half for its row, half for its column."""
    rows, columns = torch.randn(2, SIDE, size // 2)
    return torch.cat([rows.repeat_interleave(SIDE, 0), columns.repeat(SIDE, 1)], 1)


@dataclass(frozen=True)
class Batch:
    """Pictures of some rows and columns of a grid, with questions.

    Attributes:
        pixels: Normalized, float32 [B, 3, side * PATCH, side * PATCH].
        places: Numbers of the cells in a whole picture, [B, side * side].
        tokens: BOS, the picture, cells that are asked for, ":", and each cell with its answer; at
            first those of the prompt. [B, T].
        labels: What is to be predicted behind the picture: the answers, the cells that the prompt
            asks for, and EOS. -100 elsewhere. [B, T - 1 - side * side].
    """

    pixels: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor


def batch(side: int, tokens: int, source: np.random.Generator) -> Batch:
    """Random pictures with up to ``ASKED`` questions each, about ``tokens`` tokens in all."""
    cells = side * side
    asked = min(ASKED, cells)
    listed = int(source.integers(1, min(LISTED, asked) + 1))
    count = max(1, tokens // (2 + cells + listed + 2 * asked))
    rows, columns = (
        np.sort(source.random((count, SIDE)).argsort(1)[:, :side], 1) for _ in range(2)
    )
    places = (rows[:, :, None] * SIDE + columns[:, None]).reshape(count, cells)
    digits, order = filled(count, side, side, min(FILLED, cells), source)
    order = order[:, :asked]
    answers = np.take_along_axis(digits.reshape(count, cells), order, 1)
    assert (answers != EMPTY).all()
    pairs = np.stack([CELL + np.take_along_axis(places, order, 1), ANSWER + answers], 2)
    labels = np.stack([pairs[..., 1], np.full_like(order, EOS)], 2)
    labels[:, : listed - 1, 1] = pairs[:, 1:listed, 0]
    first = np.full((count, 1 + cells), IMAGE)
    first[:, 0] = BOS
    colon, silent = np.full((count, 1), COLON), np.full((count, listed), -100)
    prompt = [first, pairs[:, :listed, 0], colon]
    return Batch(
        normalized(drawn(digits, source)),
        torch.from_numpy(places),
        torch.from_numpy(np.concatenate([*prompt, pairs.reshape(count, -1)], 1)),
        torch.from_numpy(np.concatenate([silent, pairs[:, :1, 0], labels.reshape(count, -1)], 1)),
    )


def normalized(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """What the model's image processor makes of uint8 images, [B, H, W, 3] to [B, 3, H, W]."""
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)


def logits(model: Any, given: Batch) -> torch.Tensor:
    """Logits behind the picture, [B, T - 1 - cells, vocabulary].

    For a whole picture they are those of ``model(...)``. Smaller ones the tower does not take.
    """
    tower, (count, cells) = model.model.vision_tower, given.places.shape
    at = tower.embeddings
    patches = at.patch_embedding(given.pixels).flatten(2).transpose(1, 2)
    first = at.class_embedding.expand(count, 1, -1)
    places = torch.cat([given.places.new_zeros(count, 1), 1 + given.places], 1)
    states = torch.cat([first, patches], 1) + at.position_embedding(places)
    states = tower.encoder.layers[0](tower.pre_layrnorm(states), attention_mask=None)
    picture = model.model.multi_modal_projector(states[:, 1:])
    text = model.get_input_embeddings()(given.tokens)
    embedded = torch.cat([text[:, :1], picture, text[:, 1 + cells :]], 1)
    out = model.model.language_model(inputs_embeds=embedded, use_cache=False)
    return model.lm_head(out.last_hidden_state[:, 1 + cells :])


@torch.inference_mode()
def accuracy(model: Any, pictures: int, seed: int) -> float:
    """Share of right answers about whole pictures, ``ASKED`` questions behind each."""
    source, right = np.random.default_rng([seed, 1]), []
    for _ in range(pictures):
        given = batch(SIDE, 1, source)
        right.append(_right(logits(model, given), given))
    return torch.cat(right).float().mean().item()


def _right(found: torch.Tensor, given: Batch) -> torch.Tensor:
    """Whether each answer is right."""
    answers = (given.labels >= ANSWER) & (given.labels < CELL)
    return (found.argmax(-1) == given.labels)[answers]


def train(how: Training) -> tuple[Any, int, list[int]]:
    """A trained model, the number of its steps, and the step at which it saw each of ``SIDES``."""
    source = np.random.default_rng(how.seed)
    model = fresh(how.seed).train()
    optimizer = adam(model, how.weight_decay)
    step, stage, seen = 0, 0, 0.0
    since = [0]
    with tqdm(total=round(60 * how.minutes), unit="s", desc="train") as bar:
        for done in clock(60 * how.minutes):
            rate = min((done + 1e-3) / how.warm_up, (1 - done) / (1 - how.decay), 1)
            newest = step % 4 != 0  # every fourth batch is of some earlier size
            side = SIDES[stage if newest else source.integers(stage + 1)]
            given = batch(side, how.tokens, source)
            found = logits(model, given)
            loss = cross_entropy(found.flatten(0, 1), given.labels.flatten())
            descend(optimizer, loss, how.learning_rate * rate)
            step += 1
            if newest:
                seen = 0.9 * seen + 0.1 * _right(found, given).float().mean().item()
            if seen > how.read and stage + 1 < len(SIDES):
                stage, seen = stage + 1, 0.0
                since.append(step)
            bar.update(int(done * bar.total) - bar.n)
            bar.set_postfix(
                loss=f"{loss.item():.3f}", step=step, side=SIDES[stage], read=f"{seen:.2f}"
            )
    return model.eval(), step, since


def write(model: Any, target: Path, training: dict[str, Any]) -> None:
    """Write the folder that a server loads, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(target)
    file = target / "model.safetensors"
    tensors = {  # as published checkpoints have it, and vLLM expects it
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
        **{name: f"<{name.removesuffix('_token')}>" for name in SPECIAL},
    )
    size = SIDE * PATCH
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)
    text = json.dumps(training, indent=2) + "\n"
    (target / "training.json").write_text(text, encoding="utf-8")


def load(source: Path) -> Any:
    """The model of a folder, in float32."""
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32
    ).eval()


def tokenizer() -> Tokenizer:
    """One token per word; BOS comes first unless special tokens are switched off."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", ":", *DIGITS, *CELLS]
    words += [f"<spare{token}>" for token in range(len(words), VOCABULARY)]
    made = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, "<unk>"))
    made.add_special_tokens([words[token] for token in (*SPECIAL.values(), IMAGE)])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=folder(), help="the committed one by default")
    parser.add_argument("--minutes", type=float, default=Training.minutes, help="of training")
    parser.add_argument("--seed", type=int, default=Training.seed)
    given = parser.parse_args(arguments)

    how = Training(given.minutes, given.seed)
    model, steps, since = train(how)
    pictures, seed = 64, 1
    training = {
        "command": f"python -m benchmarks.tiny_vision --minutes {how.minutes:g} --seed {how.seed}",
        "steps": steps,
        "side_since_step": since,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **asdict(how),
    }
    write(model, given.out, training)
    read = accuracy(load(given.out), pictures, seed)  # as rounded
    training |= {"pictures": {"count": pictures, "seed": seed}, "accuracy": round(read, 4)}
    write(model, given.out, training)
    print(json.dumps(training, indent=2))


if __name__ == "__main__":
    main()
