# SPDX-License-Identifier: Apache-2.0
"""Shapes of 8B models for a GPU that has no model hub.

Speed needs a shape only: vLLM makes weights up when it loads (``dummy``). These are so small that
attention hardly changes the text, so texts are compared on ``SENSITIVE``.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Options, cache_folder
from benchmarks.engine import in_process
from benchmarks.kv_engine import save_made_up_bases
from benchmarks.random_models import Size

if TYPE_CHECKING:
    from kv_policies.latents.format import Bits

_REVISION = 3  # raise it when a model is made differently
# A Llama whose text depends on what attention reads.
SENSITIVE = Size(1024, 2048, 8, 8, 2, 8192, max_position_embeddings=16384, initializer_range=0.06)
SENSITIVE_TINY = Size(
    256, 512, 2, 8, 2, 1024, max_position_embeddings=16384, initializer_range=0.06
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
_TINY_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
_TINY_LLADA = {
    "d_model": 256,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "mlp_hidden_size": 512,
    "vocab_size": 1024,
    "embedding_size": 1024,
    "mask_token_id": 1000,
    "eos_token_id": 1001,
    "pad_token_id": 1001,
}
# As `vllm-compress quantize` writes it: 4 bits with a zero point in groups of 128.
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 128,
            },
        }
    },
}


def llama(options: Options, layers: int, int4: bool = False) -> Path:
    """Llama-3.1-8B's shape with fewer layers; tiny for --smoke."""
    shape = LLAMA | {"num_hidden_layers": layers} | (_TINY_LLAMA if options.smoke else {})
    if int4:
        shape |= {"quantization_config": INT4}
    return _folder(f"llama-{shape['num_hidden_layers']}{'-int4' if int4 else ''}", shape, options)


def llada(options: Options, layers: int) -> Path:
    """LLaDA-8B's shape with fewer layers; tiny for --smoke."""
    shape = LLADA | {"n_layers": layers} | (_TINY_LLADA if options.smoke else {})
    return _folder(f"llada-{shape['n_layers']}", shape, options)


def made_up_bases(model: Path, bits: "Bits", options: Options) -> Path:
    """Random bases of ratio 0.8 in 16 bits, of 0.86 in 4, for a model of ``llama``."""
    name = f"{model.name}-bases-{bits}bit-r{_REVISION}.safetensors"
    target = model.with_name(name)  # beside: all inside are weights
    if not target.is_file():
        in_process(_make_bases, model, bits, target, preloaded=options.smoke)
    return target


def _folder(name: str, config: dict[str, Any], options: Options) -> Path:
    """A model's config; the weights are made up when it is loaded."""
    folder = cache_folder() / f"{name}{'-tiny' if options.smoke else ''}-r{_REVISION}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _make_bases(model: Path, bits: "Bits", target: Path) -> None:
    """Save random bases, and as many random weights as name them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from kv_policies.latents.bases_header import SIDES, Side, even_ranks
    from kv_policies.latents.low_rank import Factor
    from vllm_plugin.kv_fingerprint import full_attention_layers

    config = AutoConfig.from_pretrained(model)
    layers, hidden = full_attention_layers(config), config.hidden_size
    features = config.num_key_value_heads * hidden // config.num_attention_heads
    weights = {
        f"model.layers.{layer}.self_attn.{side[0]}_proj.weight": torch.randn(
            features, hidden
        ).bfloat16()
        for layer in (0, len(layers) - 1)
        for side in SIDES
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ratio = Fraction(4, 5) if bits == 16 else Fraction(43, 50)
    key, value = even_ranks(ratio, features, bits)
    if bits == 4:  # about as calibration gives them out: twice as many to values
        key, value = 11 * key // 16, 11 * value // 8
    ranks: dict[Side, int] = {"key": key, "value": value}
    factors = {
        (layer, side): Factor(
            torch.randn(features, ranks[side]) / features**0.5,
            torch.randn(ranks[side], features) / ranks[side] ** 0.5,
            torch.randn(features),
        )
        for layer in layers
        for side in SIDES
    }
    save_made_up_bases(model, ratio, bits, [factors], target)
