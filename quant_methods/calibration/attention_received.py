# SPDX-License-Identifier: Apache-2.0
"""Token weights by the attention that tokens receive.

Paper: RSQ: Learning from Important Tokens Leads to Better Quantized LLMs,
https://arxiv.org/abs/2503.01820
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError
from quant_methods.calibration.token_weights import rescaled

_NAME: Final = "vllm_compress_received"  # in transformers' AttentionInterface
_CHUNK = 1 << 24  # attention scores that are in memory at once


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    chunk: int = _CHUNK,
) -> torch.Tensor:
    """Return the attention that each token receives, summed over queries and heads: [B, T].

    Queries are taken in chunks, so memory does not grow with the square of the length.

    Args:
        query: After RoPE, [B, Hq, T, D].
        key: After RoPE, [B, Hkv, T, D]. Each head serves Hq / Hkv successive query heads.
        scaling: Of the scores.
        mask: [1 or B, 1, T, T]: True where a query sees a key, or numbers that are added to the
            scores; None: each query sees the keys up to its own position.
        softcap: Bound of the scores by ``softcap * tanh(score / softcap)``; None: no bound.
        chunk: Scores that are in memory at once, at least those of one query position.
    """
    samples, heads, length, size = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    turned = key.to(kind)[:, :, None].transpose(-1, -2)
    query = query.to(kind).view(samples, key.shape[1], -1, length, size)
    received = query.new_zeros(samples, length)
    positions = torch.arange(length, device=query.device)
    step = max(1, chunk // (samples * heads * length))
    for start in range(0, length, step):
        part = slice(start, start + step)
        scores = query[..., part, :] @ turned * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is None:
            scores = scores.masked_fill(positions > positions[part, None], -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, None, part, :length], -torch.inf)
        else:
            scores = scores + mask[:, :, None, part, :length].to(kind)
        received += scores.softmax(-1).sum((1, 2, 3))
    return received


@dataclass(frozen=True)
class AttentionReceived:
    """Tokens that receive much attention in a block count more there.

    Args:
        least: As in ``rescaled``.
        power: As in ``rescaled``. The loss of the paper is ``||(W - Q) X R||^2``, so its Gram
            matrix has the squares of R. Its code multiplies X by the root of R: power 1.
    """

    least: float
    power: int = 1

    def __call__(self, blocks: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """See ``TokenWeights``."""
        return rescaled(scores_of(blocks, index, hidden), self.least, self.power)


def scores_of(blocks: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the attention that tokens receive in a resident block, [samples, length].

    transformers computes queries and keys, and hands them over through its AttentionInterface.

    Args:
        blocks: The decoder.
        index: Of the block.
        hidden: Its input, [samples, length, hidden].

    Raises:
        CompressError: The attention of the model does not go through AttentionInterface.
    """
    block, known = blocks.layers[index], blocks.structure.attention
    if known is None:
        raise CompressError(
            f"{blocks.structure.model_type} has latent attention (MLA), whose scores are not "
            "observed; use token_weights=uniform"
        )
    attention = block.get_submodule(known.module)
    inputs = hidden if known.norm is None else block.get_submodule(known.norm)(hidden)
    found: list[torch.Tensor] = []
    with _captured(attention.config):
        attention(hidden_states=inputs, received=found, **blocks.arguments(index))
    if not found:
        raise CompressError(
            f"in this transformers version the attention of {attention.config.model_type} does not "
            "go through AttentionInterface; use token_weights=uniform"
        )
    return found[0]


@contextmanager
def _captured(config: Any) -> Iterator[None]:
    """Let the attention of a model call ``_capture`` for as long as the context lasts."""
    from transformers import AttentionInterface

    before = config._attn_implementation
    AttentionInterface.register(_NAME, _capture)
    try:
        config._attn_implementation = _NAME
        yield
    finally:
        config._attn_implementation = before


def _capture(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    received: list[torch.Tensor],
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Append what tokens receive. Nobody uses the output, so it is zero."""
    received.append(attention_received(query, key, scaling, attention_mask, softcap))
    samples, heads, length, _ = query.shape
    return query.new_zeros(samples, length, heads, value.shape[-1]), None
