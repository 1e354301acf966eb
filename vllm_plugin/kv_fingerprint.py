# SPDX-License-Identifier: Apache-2.0
"""The fingerprint that ties a KV profile or bases to a model, read from a Hugging Face config.

``config`` is the language model's: see ``language_config``.
"""

from typing import Any, Final

from pydantic import ValidationError

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder
from compress_common.errors import CompressError
from kv_policies.model_file import ModelFingerprint
from quant_methods.formats.checkpoint_formats import MARKER

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors")
_KEYS_VALUES: Final = ("self_attn.k_proj", "self_attn.v_proj")
# Models that policies were tested with, of those with state-space or linear-attention layers.
HYBRIDS: Final = ("qwen3_5_text", "qwen3_5_moe_text")
# Kinds of layers that keep a state. Those of kind "hybrid" have attention too.
STATES: Final = ("linear_attention", "hybrid")
_WITHOUT_A_CACHE: Final = ("mlp", "moe")
_HEX_DIGITS: Final = 64  # of a SHA-256


def fingerprint_of(name: str, config: Any, weights: str | None = None) -> ModelFingerprint:
    """Read the fingerprint of a decoder. Its heads are those of the layers with full attention.

    Args:
        name: for messages: a hub id or a folder.
        config: the text model's. The text part of a multimodal config names no architecture; its
            model_type is used instead.
        weights: SHA-256 of every tensor, see ``published_weights``; None: not known.

    Raises:
        CompressError: the config lacks a size, or gives these layers different sizes.
    """
    known = bool(getattr(config, "num_hidden_layers", None))
    if known and (varying := shapes_per_layer(config)):
        raise CompressError(
            f"{name} has layers with full attention that differ in {', '.join(varying)}: it has no "
            "single shape of attention"
        )
    one = config
    if known:
        one = layer_configs(config)[next(iter(full_attention_layers(config)), 0)]
    heads = getattr(one, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    head_dim = getattr(one, "head_dim", None)
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int):
        head_dim = hidden // heads
    sizes = {
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(one, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "vocab_size": getattr(config, "vocab_size", None),
    }
    architectures = getattr(config, "architectures", None) or [config.model_type]
    try:
        return ModelFingerprint(name=name, architecture=architectures[0], weights=weights, **sizes)
    except ValidationError as error:
        wrong = ", ".join(f"{p['loc'][0]} is {p['input']!r}" for p in error.errors())
        raise CompressError(
            f"{name} ({architectures[0]}) is not a decoder with one shape of attention: {wrong}"
        ) from error


def layer_configs(config: Any) -> list[Any]:
    """Return the config of each layer.

    transformers raises an error where a size in which layers differ is read from the config of the
    whole model.
    """
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def shapes_per_layer(config: Any) -> list[str]:
    """List the sizes of attention in which layers with full attention differ."""
    sizes = ("head_dim", "num_key_value_heads", "num_attention_heads")
    every = layer_configs(config)
    layers = [every[index] for index in full_attention_layers(config)]
    return [name for name in sizes if len({getattr(layer, name, None) for layer in layers}) > 1]


def published_weights(name: str, config: Any) -> str | None:
    """Return the SHA-256 of every 16-bit tensor of a model, which tells a fine-tune from its base.

    An int4 checkpoint that we wrote names the digest of the one it was made from.

    Args:
        name: A model folder or hub id.
        config: The text model's.

    Returns:
        None where there is nothing to compare with: the model is not on this machine yet (the
        worker asks again once it is), others have quantized it, or its folder has no weights
        (``--load-format dummy``).

    Raises:
        CompressError: Weights are there, but not as complete safetensors. A fine-tune would go
            unnoticed, so they are refused.
    """
    if quantization := getattr(config, "quantization_config", None):
        source = (dict(quantization).get(MARKER) or {}).get("source") or ""
        return source if len(source) == _HEX_DIGITS else None  # earlier ones: of parts of files
    folder = local_folder(name, getattr(config, "_commit_hash", None))
    if folder is None or not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        return None
    try:
        return Checkpoint(folder).weights_digest
    except CompressError as error:
        raise CompressError(
            f"the profile or bases cannot be checked against these weights ({error}); serve the "
            "checkpoint as safetensors, as it was published, or choose another policy"
        ) from error


def unknown_kinds(config: Any) -> list[str]:
    """List the kinds of layers that no policy can serve, nor leave alone."""
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if config.model_type in HYBRIDS:
        known |= {*STATES, *_WITHOUT_A_CACHE}
    return sorted(set(getattr(config, "layer_types", None) or ()) - known)


def state_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers that keep a state, which no policy touches.

    Args:
        config: the text model's.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(index for index, kind in enumerate(kinds) if kind in STATES)


def full_attention_layers(config: Any, max_model_len: int | None = None) -> tuple[int, ...]:
    """Return the indices of the layers whose queries see all earlier keys.

    Layers with a sliding window are left out, unless no request can be longer than the window.

    Args:
        config: the text model's.
        max_model_len: the longest request in tokens; None: what the config says.
    """
    every = tuple(range(config.num_hidden_layers))
    longest = max_model_len or getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None)
    wide = bool(window and longest and window >= longest)
    if kinds := getattr(config, "layer_types", None):
        if wide and set(kinds) == {"sliding_attention"}:
            return every
        return tuple(i for i, kind in enumerate(kinds) if kind in ("full_attention", "hybrid"))
    # Without a list of kinds, the window applies to every layer (Mistral 7B 0.1).
    if window and not wide and getattr(config, "use_sliding_window", True):
        return ()
    return every


def weights_digest(checkpoint: Checkpoint, prefix: str, depth: int) -> str:
    """Return the SHA-256 of every tensor of a checkpoint that bases can be fitted to.

    Args:
        checkpoint: The model that is calibrated or served.
        prefix: Of the layers' inner names, such as ``model.layers``: see ``Names``.
        depth: Number of layers.

    Raises:
        CompressError: The checkpoint has no key and value projections of these names.
    """
    inner = [f"{prefix}.{i}.{name}.weight" for i in (0, depth - 1) for name in _KEYS_VALUES]
    names = list(map(checkpoint.names.outer, inner))
    if missing := [name for name in names if name not in checkpoint.files]:
        raise CompressError(f"{checkpoint.folder} has no weight {missing[0]}")
    return checkpoint.weights_digest
