# SPDX-License-Identifier: Apache-2.0
"""Random models for figures that do not depend on what a model knows: speed, memory, counts."""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Options, cache_folder
from benchmarks.engine import in_process
from vllm_plugin.demo_model import demo_model_path

_REVISION = 2  # raise it when the construction below changes


@dataclass(frozen=True)
class Size:
    """The fields of transformers' LlamaConfig that decide the size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02


LLAMA_1B = Size(2048, 5632, 22, 32, 4, 32000)  # TinyLlama's shape: 1.1 billion parameters
# For --smoke: every width in whole groups of 128; vocabulary of the demo model's tokenizer.
_DEMO_VOCABULARY = 49152
TINY = Size(128, 256, 2, 4, 2, _DEMO_VOCABULARY, tie_word_embeddings=True)

_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
# Models with something beside full attention: the config class in transformers, what is its own.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssConfig", _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": ("Gemma3TextConfig", _MIXED),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 128,  # vLLM's kernel for CPUs knows few sizes
            "linear_value_head_dim": 128,
        },
    ),
}


def random_hybrid(name: str, options: Options) -> Path:
    """Folder of a random bfloat16 model of ``HYBRIDS``, without a tokenizer, kept in the cache."""
    folder = cache_folder() / f"{name}-s{options.seed}-r{_REVISION}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            done = Path(scratch) / "model"
            in_process(_build_hybrid, name, options.seed, done, preloaded=options.smoke)
            os.replace(done, folder)
    return folder


def random_llama(size: Size, options: Options) -> Path:
    """Folder of a random bfloat16 Llama, built on the first call and kept in the cache.

    It has the demo model's tokenizer if that fits its vocabulary, else none.
    """
    folder = cache_folder() / (
        f"llama-{size.hidden_size}x{size.num_hidden_layers}-s{options.seed}-r{_REVISION}"
    )
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            done = Path(scratch) / "model"
            in_process(_build, size, options.seed, done, preloaded=options.smoke)
            os.replace(done, folder)
    return folder


def bench_model(options: Options) -> Path:
    """The model of the speed and memory parts."""
    return random_llama(TINY if options.smoke else LLAMA_1B, options)


def write_rtn(model: Path, target: Path, options: Options) -> Path:
    """An int4 checkpoint of ``model`` in groups of 128, as ``vllm-compress quantize`` writes it.

    Rounding to nearest: smoothing would change no shape and no kernel, so no speed.
    """
    in_process(_quantize, model, target, preloaded=options.smoke)
    return target


def _build(size: Size, seed: int, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = asdict(size)
    tokenizer = demo_model_path() if size.vocab_size == _DEMO_VOCABULARY else None
    if tokenizer is not None:
        known = transformers.AutoConfig.from_pretrained(tokenizer)
        fields |= {k: getattr(known, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.LlamaConfig(**fields)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # half the memory and time of building in float32
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder)
    if tokenizer is not None:
        for file in (*tokenizer.glob("tokenizer*"), *tokenizer.glob("chat_template*")):
            shutil.copy(file, folder)


def _build_hybrid(name: str, seed: int, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    kind, own = HYBRIDS[name]
    shared = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, kind)(**shared | own)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def _quantize(model: Path, target: Path) -> None:
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.plan_request import PlanRequest

    request = PlanRequest(method="rtn", settings={"group_size": 128})
    quantize_checkpoint(model, target, request)
