# SPDX-License-Identifier: Apache-2.0
"""LLaDA's published ``config.json``, read without its remote code."""

from typing import Any

from transformers import PretrainedConfig

from vllm_plugin.diffusion.names import MODEL_TYPE

# The model class is built for these values. A config with other values is refused.
_MADE_FOR: dict[str, Any] = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "weight_tying": False,
    "clip_qkv": None,
}


class LLaDAConfig(PretrainedConfig):
    """The config of LLaDA-8B, LLaDA-1.5 and smaller models of the same architecture.

    Each size can be read by vLLM's name (``hidden_size``) and by the published name (``d_model``).
    """

    model_type = MODEL_TYPE
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int = 12288,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        mask_token_id: int = 126336,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        **others: Any,
    ) -> None:
        self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.mlp_hidden_size, self.max_sequence_length = mlp_hidden_size, max_sequence_length
        self.vocab_size = embedding_size or vocab_size
        self.mask_token_id, self.rms_norm_eps = mask_token_id, rms_norm_eps
        self.hidden_act = "silu"
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)


def config_problems(config: PretrainedConfig) -> list[str]:
    """Return what the model class does not support in a published config."""
    problems = [
        f"config.json has {name} {getattr(config, name)!r}; only {made!r} is supported"
        for name, made in _MADE_FOR.items()
        if getattr(config, name, made) != made
    ]
    if not 0 <= config.mask_token_id < config.vocab_size:
        problems.append(
            f"config.json has mask_token_id {config.mask_token_id}, outside of the vocabulary of "
            f"{config.vocab_size} tokens"
        )
    return problems
