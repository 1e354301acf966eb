# SPDX-License-Identifier: Apache-2.0
"""Random Llamas for figures that do not depend on what a model knows: speed, memory, load time."""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

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


def _quantize(model: Path, target: Path) -> None:
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.planning import PlanRequest

    request = PlanRequest(method="rtn", settings={"group_size": 128})
    quantize_checkpoint(model, target, request)
