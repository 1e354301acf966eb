# SPDX-License-Identifier: Apache-2.0
"""Train a tiny LLaDA on CPU that really solves its tasks, for tests and benchmarks of decoding.

It learns two tasks over the last 32 of 32 to 64 digits: ``copy``, and ``sums``, their running sums
modulo 10. Each digit of an answer depends on one 33 tokens back, and in ``sums`` also on the digit
before it, so a wrong sum makes those behind it wrong. A canvas may end before its answer does;
behind the answer it is EOS. ``training.json`` in the folder tells how the model was made and how
accurate it is.

Cache policies differ in its probabilities but not measurably in its accuracy, presumably because a
digit depends only on tokens it sees directly, which no longer change. About 12 minutes on two
cores::

    OMP_WAIT_POLICY=passive python -m benchmarks.tiny_llada --out FOLDER

A second run gives a model as good, not the same one: the time decides how many steps there are.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.common import ROOT
from benchmarks.training import adam, clock, descend
from dllm_denoising.dense import DenseLLaDA, Shape

# Token ids. Digits are 0 to 9; ids after the tasks are spare.
PAD, BOS, EOS, MASK, UNKNOWN, EQUALS = range(10, 16)
TASKS = {"sums": 16, "copy": 17}
VOCABULARY = 32
SPECIAL = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "mask_token": MASK}
SHAPE = Shape(128, 4, 4, 4, 384, VOCABULARY, rope_theta=100.0)

ANSWER = 32  # digits of an answer
LONGEST = 64  # digits of the longest prompt; the shortest has ANSWER
CANVAS = 128  # tokens of the longest sequence: prompt, answer and the EOS that fill it up
BLOCK, THRESHOLD = 16, 0.9  # of decoding

CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | map(attribute='content')"
    " | list | last | trim -%}"
    "{{ bos_token }} {{ asked }}{% if not asked.endswith('=') %} ={% endif %}"
)


def folder() -> Path:
    """Where the committed model is."""
    return ROOT / "tests" / "fixtures" / "tiny_llada"


def prompts(task: str, count: int, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of random prompts, with those of their answers up to and with the EOS."""
    if not ANSWER <= length <= LONGEST:
        raise ValueError(f"a prompt of {length} digits; learned are {ANSWER} to {LONGEST}")
    source = random.Random(f"{task} {length} {seed}")
    lists = ([source.randrange(10) for _ in range(length)] for _ in range(count))
    return [_prompt(task, digits) for digits in lists]


def _prompt(task: str, digits: list[int]) -> tuple[list[int], list[int]]:
    kept = digits[-ANSWER:]
    answer = [total % 10 for total in accumulate(kept)] if task == "sums" else kept
    return [BOS, TASKS[task], *digits, EQUALS], [*answer, EOS]


@torch.inference_mode()
def denoise(model: DenseLLaDA, given: list[list[int]], length: int) -> list[list[int]]:
    """``length`` tokens behind each prompt, all equally long; each step is a full forward pass.

    A step looks at the leftmost ``BLOCK`` masks of a canvas and keeps the tokens whose probability
    is at least ``THRESHOLD``, or else the likeliest one.
    """
    start = len(given[0])
    canvas = torch.full((len(given), start + length), MASK)
    canvas[:, :start] = torch.tensor(given)
    while (masked := canvas == MASK).any():
        window = masked & (masked.cumsum(1) <= BLOCK)
        logits = model(canvas).float()
        logits[..., MASK] = -torch.inf
        sure, tokens = logits.softmax(-1).max(-1)
        sure = sure.where(window, -1.0)
        likeliest = torch.zeros_like(window).scatter(1, sure.argmax(1, keepdim=True), True)
        canvas = torch.where(window & ((sure >= THRESHOLD) | likeliest), tokens, canvas)
    return canvas[:, start:].tolist()


def accuracy(model: DenseLLaDA, task: str, length: int, count: int, seed: int) -> dict[str, float]:
    """Shares of right ``tokens``, the first EOS among them, and of right whole ``answers``."""
    asked = prompts(task, count, length, seed)
    room = math.ceil((ANSWER + 1) / BLOCK) * BLOCK
    got = denoise(model, [prompt for prompt, _ in asked], room)
    right = torch.tensor(got)[:, : ANSWER + 1] == torch.tensor([answer for _, answer in asked])
    shares = {"tokens": right.float().mean().item(), "answers": right.all(1).float().mean().item()}
    return {name: round(share, 4) for name, share in shares.items()}


@dataclass(frozen=True)
class Training:
    """How to train."""

    minutes: float = 11.0
    seed: int = 0
    tokens: int = 1280  # of a batch
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: float = 0.01  # until this share of the time the learning rate grows
    least_masked: float = 0.1


def train(shape: Shape, how: Training) -> tuple[DenseLLaDA, int]:
    """A model with LLaDA's objective, the prompt never masked, and the number of its steps."""
    torch.manual_seed(how.seed)
    source = random.Random(how.seed)
    model = DenseLLaDA(shape)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.9 * shape.d_model**-0.5)
    optimizer = adam(model, how.weight_decay)
    step, seen = 0, {}
    with tqdm(total=round(60 * how.minutes), unit="s", desc="train") as bar:
        for done in clock(60 * how.minutes):
            rate = min((done + 1e-3) / how.warm_up, (1 + math.cos(math.pi * done)) / 2)
            loss = _loss(model, *_batch(how.tokens, done, source), how.least_masked)
            descend(optimizer, loss, how.learning_rate * rate)
            if step % 50 == 0:
                seen = {task: f"{_probe(model, task):.2f}" for task in TASKS}
            step += 1
            bar.update(int(done * bar.total) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.3f}", step=step, **seen)
    return model.eval(), step


def _batch(tokens: int, done: float, source: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Random canvases [B, N] and, bool [N], which places are to be learned: answers and filling.

    At first most lists have small digits only: their sums are easier to guess, and without that
    adding is learned late.
    """
    length = source.choice((ANSWER, source.randint(ANSWER, LONGEST)))
    start = length + 3
    width = start + source.choice(
        (BLOCK, ANSWER, ANSWER + BLOCK, source.randint(8, CANVAS - start))
    )
    rows = []
    for _ in range(tokens // width):
        most = source.choice((1, 2, 3, 4, 6)) if source.random() < 0.7 * (1 - done) else 9
        digits = [source.randint(0, most) for _ in range(length)]
        prompt, answer = _prompt(source.choice(list(TASKS)), digits)
        rows.append((prompt + answer + [EOS] * CANVAS)[:width])
    return torch.tensor(rows), torch.arange(width) >= start


def _loss(
    model: DenseLLaDA, canvas: torch.Tensor, learned: torch.Tensor, least: float
) -> torch.Tensor:
    """Cross-entropy of masked tokens, each over the share t that is masked in its row."""
    rows = len(canvas)
    share = (torch.randperm(rows)[:, None] + torch.rand(rows, 1)) / rows  # even over 0 to 1
    share = share.clamp(min=least)
    masked = learned & (torch.rand(canvas.shape) < share)
    logits = model(canvas.masked_fill(masked, MASK))[masked]
    losses = cross_entropy(logits, canvas[masked], reduction="none")
    return (losses / share.expand(canvas.shape)[masked]).sum() / (rows * learned.sum())


@torch.inference_mode()
def _probe(model: DenseLLaDA, task: str) -> float:
    """Share of right next tokens behind half an answer."""
    asked = prompts(task, 32, ANSWER, -1)
    half = ANSWER // 2
    canvas = torch.tensor([prompt + answer[:half] + [MASK] * half for prompt, answer in asked])
    guess = model(canvas)[:, -half].argmax(-1)
    return (guess == torch.tensor([answer[half] for _, answer in asked])).float().mean().item()


def write(model: DenseLLaDA, target: Path, training: dict[str, Any]) -> None:
    """The folder a server loads."""
    target.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(target / "tokenizer.json"))
    words = {name: f"<{name.removesuffix('_token')}>" for name in SPECIAL}
    ids = {f"{name}_id": token for name, token in SPECIAL.items() if token != MASK}
    files = {
        "config": _config(model.shape),
        "generation_config": ids,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CANVAS,
            "unk_token": "<unk>",
            **words,
        },
        "training": training,
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (target / f"{name}.json").write_text(text, encoding="utf-8")


def load(source: Path) -> DenseLLaDA:
    """The model of a folder that ``write`` filled."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = DenseLLaDA(Shape(**{name: config[name] for name in asdict(SHAPE)}))
    weights = load_file(source / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return model.eval()


def tokenizer() -> Tokenizer:
    """One token per word or digit; BOS comes first unless special tokens are switched off."""
    words = [*map(str, range(10)), "<pad>", "<bos>", "<eos>", "<mask>", "<unk>", "=", *TASKS]
    words += [f"<spare{token}>" for token in range(len(words), VOCABULARY)]
    made = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, "<unk>"))
    made.add_special_tokens([words[token] for token in (*SPECIAL.values(), UNKNOWN)])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return made


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **asdict(shape),
        "embedding_size": shape.vocab_size,
        "max_sequence_length": CANVAS,
        "mask_token_id": MASK,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "weight_tying": False,
        "torch_dtype": "float32",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=folder(), help="the committed one by default")
    parser.add_argument("--minutes", type=float, default=Training.minutes, help="of training")
    parser.add_argument("--seed", type=int, default=Training.seed)
    given = parser.parse_args(arguments)

    how = Training(given.minutes, given.seed)
    model, steps = train(SHAPE, how)
    count, seed = 64, 1
    found = {
        task: {
            str(length): accuracy(model, task, length, count, seed)
            for length in tqdm((ANSWER, 48, LONGEST), desc=task, leave=False)
        }
        for task in TASKS
    }
    training = {
        "command": f"python -m benchmarks.tiny_llada --minutes {how.minutes:g} --seed {how.seed}",
        "steps": steps,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **asdict(how),
        "accuracy_prompts": {"count": count, "seed": seed},
        "accuracy": found,
    }
    write(model, given.out, training)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
