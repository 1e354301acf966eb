# SPDX-License-Identifier: Apache-2.0
"""Tiny configs of the model families that users serve, as ``config.json`` without real weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_n_groups": 1,
}

# name -> (config class in transformers, class that vLLM serves, what differs from TEXT, encoder).
# encoder: of images or sound; that config is then the text part of a multimodal one.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, None),
    "llama yarn": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            | {"original_max_position_embeddings": 512}
        },
        None,
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}, None),
    "mistral windowed": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}, None),
    "phi-4-mini": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"sliding_window": 4096, "partial_rotary_factor": 0.75},
        None,
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}, None),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}, None),
    "qwen3 moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE, None),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}, None),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _SLIDING, None),
    "gemma3 text": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SLIDING, None),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", _SLIDING, _VISION),
    "gemma4 text": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _SLIDING | {"global_head_dim": 64, "hidden_size_per_layer_input": 0},
        None,
    ),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", {}, _VISION),
    "qwen2.5 vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            }
        },
        _VISION,
    ),
    "qwen3 vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            }
        },
        _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        None,
    ),
    "qwen3 next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR | _MOE, None),
    "granite 4": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _MAMBA | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
        None,
    ),
    "falcon h1": ("FalconH1Config", "FalconH1ForCausalLM", _MAMBA, None),
    "deepseek v2": (
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
        None,
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}, None),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}, None),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}, None),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {}, None),
    "llama4 text": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
        },
        None,
    ),
    "qwen2 audio": (
        "Qwen2AudioConfig",
        "Qwen2AudioForConditionalGeneration",
        {"model_type": "qwen2"},
        {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": 4, "n_head": 4}, None),
}
# Decoders that only int4 weights are asked of.
DENSE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": None}, None),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {}, None),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}, None),
    "glm": ("GlmConfig", "GlmForCausalLM", {}, None),
    "ernie 4.5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {}, None),
    "exaone 4": ("Exaone4Config", "Exaone4ForCausalLM", _SLIDING, None),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {}, None),
    "olmo 3": ("Olmo3Config", "Olmo3ForCausalLM", _SLIDING, None),
    "seed-oss": ("SeedOssConfig", "SeedOssForCausalLM", {}, None),
    "qwen2 embedding": ("Qwen2Config", "Qwen2Model", {}, None),
    "bert": ("BertConfig", "BertModel", {}, None),
    "qwen3 moe gelu": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _MOE | {"hidden_act": "gelu"},
        None,
    ),
    "gpt neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}, None),
}
# Decoders that only KV policies are asked of.
CACHES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR, None),
    "qwen3.5 moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR | _MOE, None),
    "nemotron h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        None,
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 16},
        None,
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        None,
    ),
    "mamba 2": ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 8, "expand": 2}, None),
    "gemma3n text": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        _SLIDING | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512},
        None,
    ),
    "gemma4 e text": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _SLIDING | {"num_kv_shared_layers": 2, "global_head_dim": 32},
        None,
    ),
}


def write(family: str, folder: Path) -> Path:
    """Write the config of a family, and one small tensor, so that it passes for a checkpoint."""
    import transformers

    name, architecture, own, encoder = (FAMILIES | DENSE | CACHES)[family]
    kind, fields = getattr(transformers, name), TEXT | own
    if encoder is None:
        config = kind(**fields)
    else:
        part = "audio_config" if "audio" in family else "vision_config"
        config = kind(text_config=fields, **{part: encoder}, tie_word_embeddings=False)
    content = config.to_dict() | {"architectures": [architecture], "dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    return folder
