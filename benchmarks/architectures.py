# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the families that users serve: a config alone, or random weights as well."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # logits of about unit variance
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "out_hidden_size": 128,
}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_LINEAR_KERNEL = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_n_groups": 1,
}


class Family(NamedTuple):
    """A tiny model.

    Attributes:
        config: Config class in transformers; the whole model's where there is an encoder.
        architecture: Class that transformers and vLLM have for it.
        fields: What differs from ``TEXT``.
        encoder: Fields of an encoder of images or sound; ``fields`` are then of the text part.
        sixteen: Whether stock vLLM serves it on a CPU in bfloat16 only.
        kernel: What an engine needs beside, because vLLM's kernels for CPUs know few sizes.
    """

    config: str
    architecture: str
    fields: dict[str, Any] = {}
    encoder: dict[str, Any] | None = None
    sixteen: bool = False
    kernel: dict[str, Any] = {}

    def hf_config(self, **more: Any) -> Any:
        """Return the config of the whole model, its text part with other fields as well."""
        import transformers

        kind, fields = getattr(transformers, self.config), TEXT | self.fields | more
        if self.encoder is None:
            return kind(**fields)
        part = "audio_config" if "Audio" in self.config else "vision_config"
        return kind(text_config=fields, **{part: self.encoder}, tie_word_embeddings=False)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "llama yarn": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            | {"original_max_position_embeddings": 512}
        },
    ),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral windowed": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}),
    "phi-4-mini": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        # 48 of 64 numbers are turned: vLLM's kernel in bfloat16 turns 16 at a time
        {"sliding_window": 4096, "partial_rotary_factor": 0.75, "head_dim": 64},
    ),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # a cap that logits of a random model reach
        _SLIDING | {"tie_word_embeddings": True, "attn_logit_softcapping": 0.5},
    ),
    "gemma3 text": Family("Gemma3TextConfig", "Gemma3ForCausalLM", _SLIDING),
    "smollm3": Family("SmolLM3Config", "SmolLM3ForCausalLM"),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo 3": Family("Olmo3Config", "Olmo3ForCausalLM", _SLIDING),
    "glm": Family("GlmConfig", "GlmForCausalLM"),
    "glm4": Family("Glm4Config", "Glm4ForCausalLM"),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        # its default, 1, makes attention so sharp that bfloat16 differs from float32
        {"attention_multiplier": 32**-0.5, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "starcoder2": Family("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": None}),
    "stablelm": Family("StableLmConfig", "StableLmForCausalLM"),
    "cohere": Family("CohereConfig", "CohereForCausalLM", {"tie_word_embeddings": True}),
    "ernie 4.5": Family("Ernie4_5Config", "Ernie4_5ForCausalLM"),
    "exaone 4": Family("Exaone4Config", "Exaone4ForCausalLM", _SLIDING),
    "nemotron": Family("NemotronConfig", "NemotronForCausalLM"),
    "seed-oss": Family("SeedOssConfig", "SeedOssForCausalLM"),
    "gpt neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "bloom": Family("BloomConfig", "BloomForCausalLM", {"n_layer": 4, "n_head": 4}),
    # experts
    "qwen2 moe": Family(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", _MOE | {"shared_expert_intermediate_size": 128}
    ),
    "qwen3 moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "glm4 moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        _MOE
        | {"n_routed_experts": 4, "use_qk_norm": True}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4 text": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
        },
    ),
    "deepseek v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
        },
        kernel={"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64},
    ),
    # encoders of images or sound
    "gemma3": Family("Gemma3Config", "Gemma3ForConditionalGeneration", _SLIDING, _VISION),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        _VISION | {"model_type": "clip_vision_model", "patch_size": 14},
    ),
    "mistral3": Family("Mistral3Config", "Mistral3ForConditionalGeneration", {}, _VISION),
    "qwen2.5 vl": Family("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", _MROPE, _VISION),
    "qwen3 vl": Family(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        _MROPE,
        _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen2 audio": Family(
        "Qwen2AudioConfig",
        "Qwen2AudioForConditionalGeneration",
        {"model_type": "qwen2"},
        {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
    ),
    # layers that share caches, or whose heads differ in size
    "gemma3n text": Family(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        _SLIDING | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512},
    ),
    "gemma4 text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _SLIDING | {"global_head_dim": 64, "hidden_size_per_layer_input": 0},
    ),
    "gemma4 e text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _SLIDING | {"num_kv_shared_layers": 2, "global_head_dim": 32},
    ),
    # layers that keep a state
    "qwen3 next": Family(
        "Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR | _MOE, None, True, _LINEAR_KERNEL
    ),
    "qwen3.5": Family(
        "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR, None, True, _LINEAR_KERNEL
    ),
    "qwen3.5 moe": Family(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR | _MOE, None, True, _LINEAR_KERNEL
    ),
    "granite 4": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _MAMBA | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    ),
    "falcon h1": Family("FalconH1Config", "FalconH1ForCausalLM", _MAMBA),
    "nemotron h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 16},
    ),
    "lfm2": Family(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "mamba 2": Family("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 8, "expand": 2}),
}


# Asked of int4 weights, and not in the matrix: what generates no text, and what no one publishes.
OTHERS: dict[str, Family] = {
    "qwen2 embedding": Family("Qwen2Config", "Qwen2Model"),
    "bert": Family("BertConfig", "BertModel"),
    "qwen3 moe gelu": Family(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE | {"hidden_act": "gelu"}
    ),
}


def write_config(family: str, folder: Path) -> Path:
    """Write the config of a family, and one small tensor, so that it passes for a checkpoint."""
    import torch
    from safetensors.torch import save_file

    kind = (FAMILIES | OTHERS)[family]
    content = kind.hf_config().to_dict()
    content |= {"architectures": [kind.architecture], "dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_model(family: str, folder: Path, tokenizer: Path) -> Path:
    """Write a random bfloat16 model.

    Args:
        family: A key of ``FAMILIES``.
        folder: A new one.
        tokenizer: A model folder. Only its first token is used, whose id is in the vocabulary.
    """
    import torch
    import transformers

    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind.architecture)._from_config(kind.hf_config(**kind.kernel))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh norms are one and fresh biases zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
