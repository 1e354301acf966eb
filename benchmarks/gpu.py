# SPDX-License-Identifier: Apache-2.0
"""Speed of 8B models on a GPU, with random weights: no download, and no figure of quality.

    .venv/bin/python -m benchmarks.gpu [--part kernel|decode|denoise] [--json] [--out FILE]

kernel  one layer of Llama-3.1-8B's attention, for B requests of N tokens, cskv at ratio 0.8:
        kernel_ratio_bB_N, time of vLLM's Triton attention over raw keys and values over that of
        ours over latents; kernel_bandwidth_share_bB_N and kernel_flops_share_bB_N, what ours reads
        and computes per second over what a copy and a product of 8,192 x 8,192 do. With _int4 too.
decode  decode_ratio_bB_2000[_int4]: new tokens per second of B requests that go from 1,950 to
        2,000 tokens, cskv at ratio 0.8 over stock vLLM with its Triton attention, on 16 layers of
        Llama-3.1-8B. vLLM captures stock's step as one CUDA graph, ours in pieces.
denoise P_ratio_bB: tokens per second of B requests of 128 tokens, canvas of 128 (32 for B = 8),
        2 tokens a step, on LLaDA-8B's shape, over recomputing everything. elastic_probe is elastic
        that never refreshes, so what watching attention costs beside never. With random weights
        attention does not drift as a trained model's does, so elastic itself is not measured.

Limits. Needs an NVIDIA GPU with 80 GB. Stock vLLM is faster with FlashAttention than with Triton.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Part, Result, alternate, cache_folder, main
from benchmarks.cskv_kernel import kernel
from benchmarks.diffusion_speed import DiffusionEngine
from benchmarks.engine import Engine, in_process
from benchmarks.kv_engine import KVEngine, policy, save_made_up_bases

BATCHES = (8, 64)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLADA = {
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
STOCK = {"attention_backend": "TRITON_ATTN"}
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.1,
}


def decode(options: Options, result: Result) -> None:
    """Fill decode_ratio_*."""
    model = _folder("llama-8b-16", LLAMA)
    bases = model / "kv.safetensors"
    if not bases.is_file():
        in_process(_make_bases, model, bases)
    starts = {
        "full": partial(KVEngine, plugin=False, **STOCK),
        "cskv": partial(KVEngine, **policy("cskv", bases=str(bases))),
        "cskv_int4": partial(KVEngine, **policy("cskv", bases=str(bases), bits=4)),
    }
    more = {
        "enforce_eager": options.smoke,
        "block_size": 32,
        "max_model_len": 2048,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 9 << 30,
    }
    with ExitStack() as stack:
        engines = _together(stack, starts, model, **more)
        for batch in BATCHES:
            request = {"batch": batch, "prompt": 1950, "tokens": 50, "seed": options.seed}
            speed = alternate(
                list(engines),
                options.rounds,
                lambda name, ask=request: engines[name].ask("decode", **ask),
                f"decode {batch}",
            )
            result.details[f"tokens_per_s_b{batch}"] = speed
            for name, suffix in {"cskv": "", "cskv_int4": "_int4"}.items():
                result.ratio(f"decode_ratio_b{batch}_2000{suffix}", speed[name], speed["full"])


def denoise(options: Options, result: Result) -> None:
    """Fill P_ratio_bB."""
    model = _folder("llada-8b", LLADA)
    sections: dict[str, dict[str, Any]] = {
        "fixed_period": {},
        "dual_cache": {"block_length": 32},
        "elastic": {"gamma": 0.0},
    }
    starts = {
        name: partial(
            DiffusionEngine,
            additional_config={
                "compress": {"diffusion": {"policy": name, "tokens_per_step": 2, **section}}
            },
            **STOCK,
        )
        for name, section in sections.items()
    }
    asks = {
        "full": ("fixed_period", {"compress_period": 1}),
        "fixed_period": ("fixed_period", {}),
        "never": ("fixed_period", {"compress_period": 1000}),
        "dual_cache": ("dual_cache", {}),
        "elastic_probe": ("elastic", {}),
    }
    with ExitStack() as stack:
        more = {"max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 2 << 30}
        engines = _together(stack, starts, model, max_model_len=512, **more)
        for batch, canvas in ((1, 128), (8, 32)):

            def measure(name: str, batch: int = batch, canvas: int = canvas) -> float:
                served, extra = asks[name]
                shapes = [(128, canvas)] * batch
                seen = engines[served].ask("denoise", shapes=shapes, seed=options.seed, extra=extra)
                return seen["tokens_per_s"]

            rates = alternate(list(asks), options.rounds, measure, f"denoise {batch}")
            result.details[f"tokens_per_s_b{batch}"] = rates
            for name in asks:
                result.ratio(f"{name}_ratio_b{batch}", rates[name], rates["full"])


def _together(
    stack: ExitStack, starts: dict[str, Any], model: Path, **arguments: Any
) -> dict[str, Engine]:
    """Start engines side by side: a GPU machine has the cores, and each takes half a minute."""
    with ThreadPoolExecutor() as pool:
        begun = {
            name: pool.submit(start, model, **(ENGINE | arguments))
            for name, start in starts.items()
        }
        return {name: stack.enter_context(one.result()) for name, one in begun.items()}


def _folder(name: str, config: dict[str, Any]) -> Path:
    """A model's config; the weights are made up when it is loaded."""
    folder = cache_folder() / f"{name}-r1"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _make_bases(model: Path, target: Path) -> None:
    """Random bases of ratio 0.8, and as many random weights as name them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from kv_policies.latents.bases_header import SIDES, total_rank
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
    ratio = Fraction(4, 5)
    total = total_rank(ratio, features)
    ranks = {"key": total // 2, "value": total - total // 2}
    factors = {
        (layer, side): Factor(
            torch.randn(features, ranks[side]) / features**0.5,
            torch.randn(ranks[side], features) / ranks[side] ** 0.5,
            torch.randn(features),
        )
        for layer in layers
        for side in SIDES
    }
    save_made_up_bases(model, ratio, factors, target)


PARTS = {
    "kernel": Part(("kernel_ratio_b8_2048", "kernel_ratio_b8_2048_int4"), kernel),
    "decode": Part(("decode_ratio_b8_2000", "decode_ratio_b8_2000_int4"), decode),
    "denoise": Part(("fixed_period_ratio_b1", "never_ratio_b1"), denoise),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
