# SPDX-License-Identifier: Apache-2.0
"""What a layer of vLLM needs to hold latents: its rotary embedding, its bases, its blocks."""

from functools import lru_cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

from compress_common.errors import CompressError
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES, split_problem
from kv_policies.latents.cache import LatentCache
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.rope import Rope
from quant_methods.formats.checkpoint_formats import MARKER
from vllm_plugin.kv_cache import latent_cpu_build
from vllm_plugin.kv_cache.latent_cpu import CPULatentCache
from vllm_plugin.kv_cache.pages import Pages
from vllm_plugin.kv_cache.quantized import FP8
from vllm_plugin.settings import parse_settings

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown

# Those whose table depends on the position alone and does not scale keys.
_ROTATIONS = (RotaryEmbedding, Llama3RotaryEmbedding)

# How a method leaves keys and values as they are.
_UNCHANGED = {
    "smoothquant_plus": "without folds (the default), or with folds 'norms'",
    "rsq": "with rotation 'none'",
    "fireq": "with key_scale null",
}


class KernelRope(Rope):
    """``Rope`` with vLLM's own kernel, in place."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [M, H, D], float32 and contiguous, at positions int64 [M]; over x."""
        ops.rotary_embedding(
            positions, x.view(len(x), -1), None, x.shape[-1], self.table, self.neox
        )
        return x


def latent_problems(config: VllmConfig) -> list[str]:
    """What rules latents out before a worker starts, with the flag to change."""
    problems = []
    model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
    if problem := split_problem(model.get_total_num_kv_heads(), ranks):
        problems.append(f"{problem}; or choose another policy")
    if config.cache_config.cache_dtype in FP8:
        problems.append(no_latents(config.cache_config.cache_dtype))
    if config.lora_config is not None:
        problems.append(
            "--enable-lora: bases are fitted to the key and value weights of one model, and an "
            "adapter changes them; remove the flag or choose another policy"
        )
    written = getattr(model.hf_config, "quantization_config", None) or {}
    marker = dict(written).get(MARKER)
    weights = parse_settings(config.additional_config).weights
    folds = (weights.model_extra or {}).get("folds") if weights else None
    method = str((marker or {}).get("method") or model.quantization)
    if written and marker is None:
        problems.append(
            "a checkpoint quantized by others: its values may be scaled, so that bases of the "
            "original model would not fit; serve the 16-bit checkpoint, with --quantization "
            "smoothquant_plus, or choose another policy"
        )
    elif folds == "all" or (marker and marker.get("values_scaled", True)):
        problems.append(
            f"{method} changes the keys or values that cskv's bases are fitted to; quantize "
            f"{_UNCHANGED.get(method, 'by another method')}, or choose another policy"
        )
    return problems


def no_latents(cache_dtype: str) -> str:
    """Why latents are not kept in an FP8 cache, with what to change."""
    return (
        f"--kv-cache-dtype {cache_dtype}: latents of cskv lie in a 16-bit cache, as 16-bit numbers "
        "or, with bits 4, in a quarter of that; leave it at auto, or choose another policy"
    )


def rope_of(model: torch.nn.Module, layer: str) -> KernelRope:
    """The rotation that the keys of an attention layer get, by the layer's name.

    CompressError where there is none, or one that cannot be undone.
    """
    parent: Any = model.get_submodule(layer.rpartition(".")[0])
    found = getattr(parent, "rotary_emb", None)
    if type(found) not in _ROTATIONS:
        kinds = ", ".join(kind.__name__ for kind in _ROTATIONS)
        raise CompressError(
            f"layer {layer} rotates its keys by {type(found).__name__}; cskv can undo {kinds}; "
            "choose another policy"
        )
    return _rotation(found)


@lru_cache(maxsize=8)  # layers share a module, and its table may be large
def _rotation(module: Any) -> KernelRope:
    return KernelRope(module.cos_sin_cache.float(), module.is_neox_style)


def latent_cache(
    bases: Bases, index: int, shard: int, form: LatentFormat, pages: Pages, rope: Rope, cache: Any
) -> LatentCache:
    """The latents of a layer in its pages.

    Args:
        bases: Of the model.
        index: Of the layer in the model.
        shard: Rank of tensor parallelism.
        form: How latents lie in a block.
        pages: The layer's blocks.
        rope: The rotation of its keys.
        cache: The layer's cache, [blocks, Hkv, block_size, 2 * D].
    """
    keys, values = (bases.factor(index, side, shard) for side in SIDES)
    kind = latent_cache_type(cache.dtype, cache.device)
    if kind is CPULatentCache:
        return CPULatentCache(pages, form, keys, values, rope, kernel=latent_cpu_build.load())
    if kind is LatentCache:
        return LatentCache(pages.blocks, form, keys, values, rope)
    return kind(pages.blocks, form, keys, values, rope, cache=cache)  # type: ignore[misc]


def latent_cache_type(dtype: torch.dtype, device: torch.device) -> type[LatentCache]:
    """What reads the latents of a cache of this type, on this device."""
    if device.type != "cpu":
        from vllm_plugin.kv_cache.latent_cuda import TritonLatentCache

        return TritonLatentCache
    if reason := latent_cpu_build.why_not(dtype):
        logger.warning_once(
            "latents are read by torch, several times slower than by the kernel: %s", reason
        )
        return LatentCache
    return CPULatentCache
