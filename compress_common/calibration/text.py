# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: text the model samples for itself, or a text or JSONL file."""

from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from compress_common.calibration.text_file import read_tokens
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent

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
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the self-sampled text")

    @model_validator(mode="after")
    def _seed_has_a_use(self) -> Self:
        if self.seed and self.source != SELF:
            raise ValueError(
                "`seed` is that of text which the model samples, and the source is a file; remove "
                "one of them"
            )
        return self


def calibration_tokens(
    settings: CalibrationSettings, model: nn.Module, tokenizer: Any, progress: Progress = silent
) -> torch.Tensor:
    """Return calibration tokens, int64 [samples, length].

    Args:
        settings: Where they come from.
        model: The ``transformers`` model that samples text for ``source="self"``.
        tokenizer: Its tokenizer.
        progress: Called while text is sampled.

    Raises:
        CompressError: The text is missing, cannot be read, or is too short.
    """
    check_length(settings, model.config)
    if settings.source == SELF:
        return sampled_tokens(settings, model, start_token(tokenizer), progress)
    return file_tokens(settings, tokenizer)


def check_length(settings: CalibrationSettings, config: Any) -> None:
    """Raise CompressError when the sequences are longer than the model's positions."""
    limit = getattr(config, "max_position_embeddings", None) or settings.length
    if settings.length > limit:
        raise CompressError(
            f"calibration length {settings.length} exceeds the model's {limit} positions; "
            "lower the length"
        )


def start_token(tokenizer: Any) -> int:
    """Return the token that a text of the model's own starts with.

    Raises:
        CompressError: The tokenizer names no begin and no end token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CompressError(
        "the tokenizer names neither a begin nor an end token, so the model cannot start a "
        "text of its own; give a text file instead"
    )


def file_tokens(settings: CalibrationSettings, tokenizer: Any) -> torch.Tensor:
    """Return windows spread evenly over a calibration file, int64 [samples, length].

    Raises:
        CompressError: The file cannot be read, or is too short.
    """
    ids = read_tokens(settings.source, tokenizer)
    need = settings.samples * settings.length
    if len(ids) < need:
        raise CompressError(
            f"the calibration text {settings.source} has {len(ids)} tokens, {need} are needed "
            f"({settings.samples} samples of {settings.length}); give a longer text, or lower "
            "the samples or the length"
        )
    stride = (len(ids) - settings.length) / max(settings.samples - 1, 1)
    starts = [round(i * stride) for i in range(settings.samples)]
    return torch.tensor([ids[s : s + settings.length] for s in starts])


class _Sampled:
    """A streamer for ``generate`` that only counts the steps."""

    def __init__(self, length: int, progress: Progress) -> None:
        self.length, self.progress, self.done = length, progress, 0

    def put(self, tokens: torch.Tensor) -> None:
        self.done += 1
        self.progress("sample text, token", self.done, self.length)

    def end(self) -> None:
        pass


def sampled_tokens(
    settings: CalibrationSettings, model: nn.Module, start: int, progress: Progress = silent
) -> torch.Tensor:
    """Return text that the model samples from its own distribution, int64 [samples, length].

    Args:
        settings: How much, and the seed.
        model: A ``transformers`` model that generates.
        start: The first token of every sequence.
        progress: Called for every step.
    """
    device: torch.device = model.device  # type: ignore[assignment]
    # Ranks that sample with one seed would differ for good if it were left in one of them.
    seeded = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(seeded), torch.no_grad():
        torch.manual_seed(settings.seed)
        prompt = torch.full((settings.samples, 1), start, device=device)
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
            pad_token_id=start,
            streamer=_Sampled(settings.length, progress),
        )
    return tokens.cpu()
