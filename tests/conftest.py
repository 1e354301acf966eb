# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: the demo model, and tiny random models of several architectures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A small CPU engine that talks to nobody. Set before any test module imports vLLM or transformers.
for _name, _value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, and no server bound to the core of another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# name -> (config class in transformers, what differs from SHARED). Each entry has something that a
# weight method can get wrong.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),  # biases on q, k, v
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),  # norms on q and k
    "gemma3": (  # norm weights stored minus one, four norms a layer, local and global attention
        "Gemma3TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "query_pre_attn_scalar": 32,
        },
    ),
}

# Other dense decoders: nothing in the package knows them by name.
MORE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", {"logit_scale": 1.0}),  # attention and MLP read one LayerNorm
    "ernie4_5": ("Ernie4_5Config", {}),
    "exaone4": (  # norms behind attention and MLP alone
        "Exaone4Config",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    ),
    "glm": ("GlmConfig", {"tie_word_embeddings": False}),  # gate and up in one linear
    "glm4": ("Glm4Config", {"tie_word_embeddings": False}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "nemotron": ("NemotronConfig", {"tie_word_embeddings": False}),  # LayerNorm with 1 + w
    "olmo2": ("Olmo2Config", {"tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {"sliding_window": None, "tie_word_embeddings": False}),
    "seed_oss": ("SeedOssConfig", {"tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {"tie_word_embeddings": False}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),  # biases, LayerNorm, no gate
}

_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,  # vLLM's kernel for CPUs knows few sizes
    "linear_value_head_dim": 128,
}
_UNEQUAL: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
}
_ONE_GLOBAL_HEAD = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
# Models whose attention or cache has something else beside. KV policies serve them.
KV_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (  # attention sinks, experts
        "GptOssConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # Other heads in full attention than in windows, so other blocks: larger ones, or smaller ones.
    "gemma4": ("Gemma4TextConfig", _UNEQUAL | {"num_key_value_heads": 4, **_ONE_GLOBAL_HEAD}),
    "gemma4_large": ("Gemma4TextConfig", _UNEQUAL),
    "qwen3_5": ("Qwen3_5TextConfig", _LINEAR),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        _LINEAR | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}

_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# Decoders with routed experts.
EXPERT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (  # a dense first layer, shared experts, a bias that only chooses
        "Glm4MoeConfig",
        _FOUR | _GROUPS | {"n_routed_experts": 4, "use_qk_norm": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),  # other names in checkpoints
    "qwen2_moe": ("Qwen2MoeConfig", _FOUR | {"shared_expert_intermediate_size": 128}),  # two gates
    "qwen3_moe": ("Qwen3MoeConfig", _FOUR | {"norm_topk_prob": True}),
}

# Groups of 32, 64 and 128 divide every width; 32 is the smallest head vLLM's CPU attention takes.
SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    # Logits of about unit variance. Two implementations agree to 0.05 in log-probability; compare
    # those rather than greedy tokens, whose two best can be equal in bfloat16.
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16 (converted on the first use, 20 seconds)."""
    from vllm_plugin.demo_model import demo_model_path

    return demo_model_path()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Callable[..., Path]:
    """Return ``make(arch, seed=0, **config)``: the folder of a random bfloat16 model.

    ``arch`` is a key of a table above, ``config`` overrides fields of its Hugging Face config. The
    same call gives the same folder, so tests must copy it before they change anything in it. The
    tokenizer is the demo model's.
    """
    made: dict[str, Path] = {}

    def make(arch: str = "llama", seed: int = 0, **config: Any) -> Path:
        key = repr((arch, seed, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{arch}-")
            _save_tiny_model(folder, arch, seed, config, demo_model)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(params=sorted(TINY_MODELS))
def each_tiny_model(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    """Run the test once for each architecture."""
    return tiny_model(request.param)


def _save_tiny_model(
    folder: Path, arch: str, seed: int, overrides: dict[str, Any], tokenizer: Path
) -> None:
    import transformers

    class_name, own = (TINY_MODELS | MORE_MODELS | KV_MODELS | EXPERT_MODELS)[arch]
    build = transformers.AutoModelForCausalLM.from_config
    save_random(folder, class_name, own | overrides, build, seed, tokenizer)


def save_random(
    folder: Path,
    config_class: str,
    own: dict[str, Any],
    build: Callable[[Any], Any],
    seed: int,
    tokenizer: Path,
) -> None:
    """Write a random model in bfloat16, with the demo model's tokenizer.

    Args:
        folder: Of the model.
        config_class: Its name in transformers.
        own: What its config has beside or in place of ``SHARED``.
        build: Makes the model of a config.
        seed: Of its weights.
        tokenizer: The folder of a model.
    """
    import torch
    import transformers

    source = transformers.AutoConfig.from_pretrained(tokenizer)
    tokens = {k: getattr(source, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = SHARED | {"vocab_size": source.vocab_size} | tokens | own
    config = getattr(transformers, config_class)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            # Fresh norms are all one and fresh biases all zero, which would hide a forgotten one.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
