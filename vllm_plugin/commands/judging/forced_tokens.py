# SPDX-License-Identifier: Apache-2.0
"""Requests that generate given tokens: what a model thinks of text behind a compressed prompt.

Log-probabilities of a prompt would all be those of the full cache, as it is compacted at its end.
"""

from typing import Any, Final

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    process_dict_updates,
)

from vllm_plugin.commands.judging.figures import token_nats

FORCED: Final = "forced"  # key of SamplingParams.extra_args: the token ids to be sampled, in order
FREE: Final = -1  # in place of a token id: the model samples it


class ForcedTokens(LogitsProcessor):
    """Samples the tokens that a request lists, one a step; others are not touched.

    Log-probabilities are taken before this (``logprobs_mode`` is raw by default), so they are what
    the model thinks of the text it is made to write.
    """

    def __init__(self, config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        # Row -> (tokens to be sampled, tokens sampled so far; vLLM appends to the latter).
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    @staticmethod
    def _row(
        params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> tuple[list[int], list[int]] | None:
        forced = (params.extra_args or {}).get(FORCED)
        return (forced, output) if forced else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, output) in self._rows.items():
            # The row of a chunk that does not end the prompt is sampled too, and thrown away.
            token = forced[min(len(output), len(forced) - 1)]
            if token != FREE:
                logits[row].fill_(-torch.inf)
                logits[row, token] = 0
        return logits


def forcing(tokens: list[int]) -> SamplingParams:
    """Return how a request generates ``tokens``, with the log-probability of each.

    Args:
        tokens: ids in order; ``FREE``: the model chooses. The engine needs ``ForcedTokens`` among
            its ``logits_processors``.
    """
    return SamplingParams(
        temperature=0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,  # the sampled token's only
        detokenize=False,
        extra_args={FORCED: tokens},
    )


def generate(llm: LLM, requests: list[tuple[list[int], list[int]]]) -> list[Any]:
    """Return vLLM's output of each request: a prompt, and tokens as in ``forcing``."""
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests]
    sampling = [forcing(tokens) for _, tokens in requests]
    return [made.outputs[0] for made in llm.generate(prompts, sampling, use_tqdm=False)]


def forced_nats(llm: LLM, windows: list[list[int]], context: int) -> list[list[float]]:
    """Return the negative log-likelihood of each token behind a prompt, measured in decode.

    Args:
        llm: the engine, see ``forcing``.
        windows: token ids.
        context: how many of each window are its prompt.
    """
    requests = [(window[:context], window[context:]) for window in windows]
    return [token_nats(output.token_ids, output.logprobs) for output in generate(llm, requests)]
