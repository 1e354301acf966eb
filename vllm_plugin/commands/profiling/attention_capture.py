# SPDX-License-Identifier: Apache-2.0
"""Captures the attention that tokens receive, through transformers' AttentionInterface."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress_common.errors import CompressError
from kv_policies.attention import attention_received

ATTENTION: Final = "vllm_compress_capture"  # the attn_implementation to load a model with
# Arguments that make attention more than a plain causal softmax, by transformers' names.
_NOT_MODELLED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Register ``ATTENTION`` with transformers. Models that use it compute SDPA."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def attention_of(network: Any, tokens: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Return the attention that each token receives, float32 [layers, T] on the CPU.

    It is summed over all queries and averaged over heads.

    Args:
        network: A transformers model that was loaded with ``ATTENTION``.
        tokens: int64 [1, T], without padding.
        layers: Indices of the layers to look at.

    Raises:
        CompressError: The model's attention is not a plain causal softmax, or does not go through
            AttentionInterface.
    """
    received: dict[int, torch.Tensor | None] = dict.fromkeys(layers)
    try:
        # The decoder alone: logits of a whole sample would be as large as a small model.
        network.base_model(input_ids=tokens.to(network.device), use_cache=False, received=received)
    except (AttributeError, TypeError) as error:  # an older decoder does not pass arguments on
        raise not_reached(network.config) from error
    rows = [row for row in received.values() if row is not None]
    if len(rows) < len(layers):
        raise not_reached(network.config)
    return torch.stack(rows).cpu()  # at once: the host waits for the device once


def not_reached(config: Any) -> CompressError:
    """Return the error for a model with attention code of its own."""
    return CompressError(
        f"{config.model_type} cannot be profiled: in transformers its attention does not go "
        "through AttentionInterface"
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    received: dict[int, torch.Tensor | None] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that also fills ``received``, an argument of the model's forward.

    query is [1, Hq, T, D] and key is [1, Hkv, T, D], both after RoPE.
    """
    if received is not None and module.layer_idx in received:
        found = [what for what in _NOT_MODELLED if kwargs.get(what) is not None]
        if not getattr(module, "is_causal", True):
            found.append("attention to later tokens")
        if found:
            raise CompressError(
                f"layer {module.layer_idx} of {module.config.model_type} uses {', '.join(found)}; "
                "KV policies model plain causal attention only"
            )
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        positions = torch.arange(query.shape[2], device=query.device)[None]
        heads = attention_received(query.float(), positions, key.float(), scale)
        received[module.layer_idx] = heads.mean(1)[0]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
