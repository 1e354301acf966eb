# SPDX-License-Identifier: Apache-2.0
"""snap_kv in transformers: what the later tokens of a compressed request should be.

An answer is judged in one pass over prompt and answer. Queries of the answer do not see the prompt
tokens that were evicted, in each layer with full attention and for each of its KV heads. Scores are
taken from the attention probabilities of the model's own code, so what is special about its softmax
(a soft cap, sinks) is in them. Nothing here is shared with ``kv_policies``.
"""

import math
import sys
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch

NAME = "benchmarks_snap_kv"  # in transformers' AttentionInterface
WINDOW, POOL, LEAST = 16, 15, 128  # defaults of snap_kv, and of min_prompt


class Kept(NamedTuple):
    """How much of prompts stays.

    Attributes:
        keep: Share of the whole blocks of a prompt.
        block: Tokens of a block.
    """

    keep: Fraction
    block: int

    def after(self, network: Any, prompt: int) -> None:
        """Let a model see what is kept of a prompt from the token behind it on.

        Args:
            network: A model of transformers.
            prompt: Tokens of the prompt. Positions behind it are those of the answer.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(NAME, partial(_attention, kept=self, prompt=prompt))
        AttentionMaskInterface.register(NAME, eager_mask)
        network.set_attn_implementation(NAME)

    def of_prompt(self, votes: torch.Tensor) -> torch.Tensor:
        """Choose tokens.

        Args:
            votes: What the last tokens attend to, float [Hkv, N], N tokens of the prompt.

        Returns:
            Whether each token stays, bool [Hkv, N].
        """
        heads, prompt = votes.shape
        blocks = prompt // self.block
        if prompt < -(-LEAST // self.block) * self.block:
            return torch.ones(heads, prompt, dtype=torch.bool)
        at, whole = torch.arange(prompt), blocks * self.block
        recent = at >= prompt - WINDOW
        votes = votes.masked_fill(recent, 0)
        scores = torch.nn.functional.max_pool1d(votes, POOL, stride=1, padding=POOL // 2)
        scores = torch.where(recent, scores.max() + 1 + at, scores)
        scores[:, [0, whole - 1]] = torch.inf
        best = scores[:, :whole].argsort(dim=1, descending=True, stable=True)
        kept = (at >= whole).repeat(heads, 1)  # the block that the prompt does not fill
        return kept.scatter(1, best[:, : math.ceil(self.keep * blocks) * self.block], True)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    kept: Kept,
    prompt: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own attention, [1, Hq, T, D], twice: to choose, and without what is evicted."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = eager(module, query, key, value, mask, **kwargs)
    if mask[0, 0, -1, 0] < 0:  # a sliding window, or chunks: the last token does not see the first
        return output, weights
    heads = key.shape[1]
    votes = weights[0, :, max(0, prompt - WINDOW) : prompt, :prompt].float().sum(1)
    stays = kept.of_prompt(votes.unflatten(0, (heads, -1)).mean(1))
    mask = mask.repeat(1, query.shape[1], 1, 1)
    evicted = ~stays.repeat_interleave(query.shape[1] // heads, 0)
    mask[0, :, prompt:, :prompt].masked_fill_(evicted[:, None], torch.finfo(mask.dtype).min)
    return eager(module, query, key, value, mask, **kwargs)
