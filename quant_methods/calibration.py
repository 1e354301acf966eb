# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: text the model samples for itself, or a text or JSONL file."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress_common.errors import CompressError
from quant_methods.base import Progress, silent

SELF = "self"


class CalibrationSettings(BaseModel):
    """Where calibration tokens come from and how many are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        SELF,
        description="'self' (the model samples its own text: no data set, nothing leaks from an "
        "evaluation) or the path of a .txt or .jsonl file ('text' or 'messages' per line)",
    )
    samples: int = Field(32, ge=1, le=4096, description="sequences; more: slower, steadier")
    length: int = Field(32, ge=16, le=32768, description="tokens per sequence")
    seed: int = Field(0, ge=0, description="seed of the self-sampled text")


def calibration_tokens(
    settings: CalibrationSettings, model: nn.Module, tokenizer: Any, progress: Progress = silent
) -> torch.Tensor:
    """Token ids, int64 [samples, length]; CompressError when the text is missing or too short."""
    limit = getattr(model.config, "max_position_embeddings", settings.length)
    if settings.length > limit:
        raise CompressError(
            f"calibration length {settings.length} exceeds the model's {limit} positions; "
            "lower the length"
        )
    if settings.source == SELF:
        return _self_sampled(settings, model, tokenizer, progress)
    path = Path(settings.source)
    if not path.is_file():
        raise CompressError(
            f"calibration text {settings.source!r} is not a file; give 'self' or the path of a "
            ".txt or .jsonl file"
        )
    return _windows(_read(path, tokenizer), settings)


class _Sampled:
    """A streamer for ``generate`` that only counts the steps."""

    def __init__(self, length: int, progress: Progress) -> None:
        self.length, self.progress, self.done = length, progress, 0

    def put(self, tokens: torch.Tensor) -> None:
        self.done += 1
        self.progress("sample text", self.done, self.length)

    def end(self) -> None:
        pass


def _self_sampled(
    settings: CalibrationSettings, model: nn.Module, tokenizer: Any, progress: Progress
) -> torch.Tensor:
    start = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None
    )
    if start is None:
        raise CompressError(
            "the tokenizer names neither a begin nor an end token, so the model cannot start a "
            "text of its own; give a text file instead"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(settings.seed)
        prompt = torch.full((settings.samples, 1), start, device=model.device)
        tokens = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=settings.length - 1,  # no early end: every position carries text
            max_new_tokens=settings.length - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.eos_token_id or start,
            streamer=_Sampled(settings.length, progress),
        )
    return tokens.cpu()


def _read(path: Path, tokenizer: Any) -> list[int]:
    """All tokens of a file, documents joined by the end token."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompressError(f"{path} is not UTF-8 text: {error.reason}") from error
    if path.suffix != ".jsonl":
        return tokenizer(text, verbose=False)["input_ids"]
    ids: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CompressError(f"{path}:{number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not ({"messages", "text"} & row.keys()):
            raise CompressError(f"{path}:{number} needs a 'text' or a 'messages' key")
        if "messages" in row:
            document = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        else:
            document = row["text"]
        ids += tokenizer(document, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return ids


def _windows(ids: list[int], settings: CalibrationSettings) -> torch.Tensor:
    """``samples`` windows spread evenly over the text."""
    need = settings.samples * settings.length
    if len(ids) < need:
        raise CompressError(
            f"the calibration text has {len(ids)} tokens, {need} are needed "
            f"({settings.samples} samples of {settings.length}); give a longer text, or lower "
            "the samples or the length"
        )
    stride = (len(ids) - settings.length) / max(settings.samples - 1, 1)
    starts = [round(i * stride) for i in range(settings.samples)]
    return torch.tensor([ids[s : s + settings.length] for s in starts])
