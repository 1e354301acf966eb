# SPDX-License-Identifier: Apache-2.0
"""Captures the attention that tokens receive, through transformers' AttentionInterface."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress_common.errors import CompressError
from kv_policies.attention import attention_received

ATTENTION: Final = "vllm_compress_capture"  # the attn_implementation to load a model with
# Arguments that make attention more than a plain causal softmax, by transformers' names.
_NOT_MODELLED = ("softcap", "position_bias")
_ALIGNED = 8  # elements that CUDA's kernels want head sizes to be multiples of


def register() -> None:
    """Register ``ATTENTION`` with transformers. Models that use it compute SDPA, with sinks."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def attention_of(
    network: Any, inputs: Mapping[str, torch.Tensor], layers: Sequence[int]
) -> torch.Tensor:
    """Return the attention that each token receives, float32 [layers, T] on the CPU.

    It is summed over all queries and averaged over heads.

    Args:
        network: A transformers model that was loaded with ``ATTENTION``.
        inputs: What it takes: ``input_ids`` [1, T] without padding, and what belongs to images.
        layers: Indices of the layers to look at, of the language model.

    Raises:
        CompressError: The model's attention is not a plain causal softmax, or does not go through
            AttentionInterface.
    """
    received: dict[int, torch.Tensor | None] = dict.fromkeys(layers)
    given = on_device(inputs, network)
    config, body = network.config, network.base_model
    decoder = body if config.get_text_config() is config else network.get_decoder()
    # Given to the decoder alone: a tower of images would not know what it is.
    observed = decoder.register_forward_pre_hook(
        lambda _, args, named: (args, named | {"received": received}), with_kwargs=True
    )
    try:
        # Without the head: logits of a whole sample would be as large as a small model.
        body(**given, use_cache=False)
    except (AttributeError, TypeError) as error:  # an older decoder does not pass arguments on
        raise not_reached(network.config) from error
    finally:
        observed.remove()
    rows = [row for row in received.values() if row is not None]
    if len(rows) < len(layers):
        raise not_reached(network.config)
    return torch.stack(rows).cpu()  # at once: the host waits for the device once


def on_device(inputs: Mapping[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """Return inputs where a model is, its floating-point ones in the model's type."""
    return {
        name: value.to(network.device, network.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


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
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that also fills ``received``, an argument of the model's forward.

    query is [1, Hq, T, D] and key is [1, Hkv, T, D], both after RoPE. s_aux is what transformers
    calls the logits of attention sinks, [Hq].
    """
    if received is not None and module.layer_idx in received:
        found = [what for what in _NOT_MODELLED if kwargs.get(what) is not None]
        if not getattr(module, "is_causal", True) or _looks_ahead(attention_mask):
            found.append("attention to later tokens")
        if found:
            raise CompressError(
                f"layer {module.layer_idx} of {module.config.model_type} uses {', '.join(found)}; "
                "KV policies model plain causal attention only"
            )
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        positions = torch.arange(query.shape[2], device=query.device)[None]
        heads = attention_received(query.float(), positions, key.float(), scale, s_aux)
        received[module.layer_idx] = heads.mean(1)[0]
    if s_aux is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        query, key, value, attention_mask = with_sinks(
            query, key, value, attention_mask, s_aux / scale
        )
        kwargs["scaling"] = scale
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _looks_ahead(mask: torch.Tensor | None) -> bool:
    """Whether some query sees a later key, as tokens of one image do in Gemma 3."""
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen.triu(1).any())


def with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn attention with sinks into plain attention with one more key.

    That key has a channel of its own, in which each query holds the sink of its head. Its value is
    zero, so it takes its share of the softmax and gives nothing.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        mask: Added to logits, or True where a query sees a key, [B, 1, Q, T]; None: causal, with Q
            the last of T tokens.
        sinks: Logits of the sinks before scaling, [Hq].

    Returns:
        The four with a key and a channel more. Channels are padded to what kernels want.
    """
    queries, tokens, size = query.shape[2], key.shape[2], query.shape[3]
    if mask is None:
        mask = query.new_ones((1, 1, queries, tokens), dtype=torch.bool).tril(tokens - queries)
    seen = True if mask.dtype == torch.bool else 0.0
    pad, more = torch.nn.functional.pad, -size % _ALIGNED or _ALIGNED
    query, key = pad(query, (0, more)), pad(key, (0, more, 0, 1))
    query[..., size] = sinks[None, :, None]
    key[..., -1, size] = 1
    return query, key, pad(value, (0, 0, 0, 1)), pad(mask, (0, 1), value=seen)
