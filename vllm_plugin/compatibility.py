# SPDX-License-Identifier: Apache-2.0
"""Which models can be compressed, told from their Hugging Face config before any weight is read.

``plan``, ``doctor``, the config edge and the worker ask here, so that they give one answer. The
worker looks at its layers as well (``kv_cache.support.layer_problems``): a last guard, for what a
config does not show. No import of vLLM: ``plan`` does without it.

``config`` is the language model's: see ``language_config``.
"""

from collections.abc import Mapping
from typing import Any

from compress_common.errors import CompressError
from kv_policies.base import Capabilities
from vllm_plugin.diffusion.names import ARCHITECTURE, MODEL_TYPE
from vllm_plugin.kv_fingerprint import full_attention_layers, shapes_per_layer, unknown_kinds

MLA = "multi-head latent attention (MLA) keeps one latent per token, for which no policy is made"
STATE = "a model with state-space or linear-attention layers was never tested"
ENCODER = "an encoder-decoder model has a second cache, for which no policy is made"
SINKS = "attention sinks, which this policy does not count (snap_kv, prefix_kv, h2o and r_kv do)"
_REMOVE = "; remove compress.kv"

# Where configs have the length of a model, as vLLM looks for it.
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
# Prefixes of settings of recurrent layers, for configs that do not list the kinds of their layers.
_RECURRENT = ("mamba_", "ssm_", "linear_attn_", "conv_L_cache", "state_size", "full_attention_int")
# Models whose biases, norms and rotations of keys cskv was tested with.
MODELS_WITH_BASES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
# Rotations that ``kv_cache.latent.rope_of`` can undo.
_ROTATIONS = ("default", "llama3")
# Other diffusion models, with the reason why they are not served.
_BLOCK_CAUSAL = (
    "is block-causal: tokens before the active block never change, so a refresh policy has nothing "
    "to decide"
)
_OTHER_DIFFUSION = {
    "llada2_moe": _BLOCK_CAUSAL,
    "diffusion_gemma": _BLOCK_CAUSAL,
    "Dream": "shifts its logits by one position, which is not built",
    "llada_moe": "is a mixture of experts, which is not built",
}


def kv_model_problems(
    config: Any, policy: Capabilities | None = None, *, max_model_len: int | None = None
) -> list[str]:
    """Everything about a model that rules KV compression out.

    Args:
        config: the text model's.
        policy: what it needs and offers; None: one that any model with keys and values can have.
        max_model_len: the longest request in tokens; None: what the config says.

    Returns:
        One line per problem, with what to change; empty when there is none.
    """
    others = unknown_kinds(config)
    shapes = shapes_per_layer(config)
    found = {
        ENCODER: bool(getattr(config, "is_encoder_decoder", False)),
        MLA: bool(getattr(config, "kv_lora_rank", None)),
        STATE: _is_recurrent(config),
        f"layers of kinds {', '.join(others)}, for which no policy is made": bool(others),
        "layers that share another layer's KV cache": bool(
            getattr(config, "num_kv_shared_layers", 0)
        ),
        f"layers with full attention that differ in {', '.join(shapes)}, where all must have one "
        "shape": bool(shapes),
        SINKS: has_sinks(config) and policy is not None and not policy.serves_sinks,
        "ALiBi: a token that moves to another place would get another bias": _has_alibi(config),
    }
    problems = [problem for problem, present in found.items() if present]
    if not problems and not full_attention_layers(config, max_model_len):
        problems.append(
            "no layer with full attention: sliding windows bound their cache themselves"
        )
    problems = [problem + _REMOVE for problem in problems]
    latents = policy is not None and policy.content == "latents"
    return problems + (latent_model_problems(config) if latents else [])


def refuse_diffusion(model_type: str | None) -> None:
    """Refuse ``compress.diffusion`` for a model that does not denoise.

    Args:
        model_type: of the whole model, from its config.

    Raises:
        CompressError: says why this model is not served by denoising.
    """
    if model_type != MODEL_TYPE:
        why = _OTHER_DIFFUSION.get(str(model_type), "does not denoise a canvas")
        raise CompressError(
            f"compress.diffusion is set, but this model ({model_type}) {why}; remove the section, "
            f"or serve a model of type {MODEL_TYPE} ({ARCHITECTURE})"
        )


def drop_wide_window(config: Any, max_model_len: int) -> bool:
    """Take the sliding window off a model that no request can fill.

    Without a window its layers have full attention and can be compressed; the outputs are the same.

    Args:
        config: the text model's, changed in place.
        max_model_len: the longest request in tokens.

    Returns:
        Whether the window was taken off: every layer had one of at least ``max_model_len``.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    every_layer = kinds is None or set(kinds) == {"sliding_attention"}
    if not window or window < max_model_len or not every_layer:
        return False
    config.sliding_window = None
    if kinds is not None:
        config.layer_types = ["full_attention"] * len(kinds)
    return True


def model_length(config: Any) -> int | None:
    """How many tokens a request can have, as vLLM derives ``--max-model-len`` from the config.

    Args:
        config: the text model's.

    Returns:
        Tokens; None where the config has no length.
    """
    longer = getattr(config, "model_max_length", None)
    lengths = [longer] if longer else [getattr(config, name, None) for name in _LENGTHS]
    known = [length for length in lengths if isinstance(length, int)]
    return int(min(known) * _rope_factor(config)) if known else None


def _rope_factor(config: Any) -> float:
    """How much longer RoPE scaling makes the context, where the config's length is without it."""
    if "gemma3" in str(config.model_type):
        return 1.0
    scaled = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn")
    factors = [
        rope.get("factor") or 1.0
        for rope in _ropes(config)
        if rope.get("rope_type", rope.get("type", "default")) not in scaled
    ]
    return float(factors[-1]) if factors else 1.0


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotations: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def latent_model_problems(config: Any) -> list[str]:
    """List what rules out latents (cskv) for a model that other policies can compress.

    Args:
        config: the language model's.

    Returns:
        One line per problem, with what to change; empty when there is none.
    """
    problems = []
    if config.model_type not in MODELS_WITH_BASES:
        problems.append(
            f"cskv has bases for models of type {', '.join(MODELS_WITH_BASES)}, this one is "
            f"{config.model_type}; choose another policy"
        )
    if getattr(config, "attn_logit_softcapping", None):
        problems.append("attention logits are capped, which latents do not do; use snap_kv")
    if any(rope.get("mrope_section") for rope in _ropes(config)):
        problems.append(
            "keys are rotated by M-RoPE, by three positions of each token of an image, and cskv "
            "keeps one; choose another policy"
        )
    kinds = {rope.get("rope_type", rope.get("type", "default")) for rope in _ropes(config)}
    if others := sorted(map(str, kinds - set(_ROTATIONS))):
        problems.append(
            f"keys are rotated by RoPE of type {', '.join(others)}; cskv can undo "
            f"{', '.join(_ROTATIONS)}; choose another policy"
        )
    return problems


def _is_recurrent(config: Any) -> bool:
    """Whether some layers keep a state in place of keys and values."""
    if getattr(config, "layer_types", None) is not None:
        return False  # ``unknown_kinds`` names them
    return any(name.startswith(_RECURRENT) for name in vars(config))


def has_sinks(config: Any) -> bool:
    """Whether full-attention layers have a learned sink in their softmax.

    Args:
        config: the text model's.
    """
    if config.model_type in ("gpt_oss", "openai_privacy_filter"):
        return True
    if config.model_type in ("granite", "granitemoe"):  # as vLLM's granite.py decides
        kinds = getattr(config, "layer_types", None)
        return bool(getattr(config, "attention_sinks", kinds is not None))
    return bool(getattr(config, "add_full_attention_sink_bias", False))  # MiMo


def _has_alibi(config: Any) -> bool:
    """Whether attention has a bias by distance in place of a rotation."""
    attention = getattr(config, "attn_config", None)
    nested = attention.get("alibi") if isinstance(attention, Mapping) else None
    return bool(
        getattr(config, "alibi", False)
        or nested
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type in ("bloom", "step1")
        or (config.model_type == "baichuan" and config.hidden_size != 4096)
    )
