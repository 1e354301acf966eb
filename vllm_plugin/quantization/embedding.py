# SPDX-License-Identifier: Apache-2.0
"""Quantized token embeddings and lm_heads on CPU, tied or not: one copy serves both."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, pad
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (  # noqa: E501
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.platforms import current_platform

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder
from compress_common.errors import CompressError
from compress_common.structure.wrapper import language_config
from vllm_plugin.quantization.cpu_int4_ops import cpu_int4_linear, crossover, int4pack_layout
from vllm_plugin.quantization.cpu_int4_packing import pack_int4

_ROWS = 64  # int4pack interleaves up to so many
# Speculative decoding whose drafts need no embedding of the target.
_DRAFTS_OF_TEXT = ("ngram", "suffix")


class QuantizedEmbedding(CompressedTensorsEmbeddingWNA16Int):
    """Rows of the vocabulary in 8 bits with one scale each, or in 4 bits with symmetric groups.

    Parameters and vocabulary shards are those of the base class. Rows that pad the vocabulary have
    scale 0. A lookup dequantizes the rows that it returns. The head multiplies them, with 16-bit
    activations, by torch's int8 GEMM or as ``CpuInt4LinearKernel`` does.
    """

    layout: tuple[int, bool]  # of int4pack; torch.compile could not trace how it is found

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the loaded parameters by those that the kernels take. A second call does nothing.

        8 bits: codes int8 [V, H], scales [V, 1]. 4 bits: see ``cpu_int4_ops``, with V rounded up.
        """
        words, scales = layer.weight_packed.data, layer.weight_scale.data
        if words.dtype != torch.int32:
            return
        if self.num_bits == 8:
            # In place: code c is stored as c + 128, the first in the lowest byte.
            new = words.view(torch.int8).bitwise_xor_(-128), scales
        else:
            more = (0, 0, 0, -len(words) % _ROWS)
            new = pack_int4(pad(words, more), pad(scales, more), None)
            crossover(*new, self.group_size)
            layout = int4pack_layout()
            assert layout is not None  # the config edge refuses int4 embeddings without it
            self.layout = layout
        for name, tensor in zip(("weight_packed", "weight_scale"), new, strict=True):
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of token ids [...], as [..., H] in the type of the model."""
        weight, scale = layer.weight_packed, layer.weight_scale
        if self.num_bits == 8:
            return embedding(input_, weight).to(scale.dtype) * embedding(input_, scale)
        rows = int4pack_rows(weight, scale, input_.reshape(-1), *self.layout)
        return rows.view(*input_.shape, layer.hidden_size)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [..., H] by the rows of this rank: [..., V]."""
        weight, scale = layer.weight_packed, layer.weight_scale
        if self.num_bits == 8:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            out = torch.ops.aten._weight_int8pack_mm(rows, weight, scale.view(-1))
            out = out.view(*x.shape[:-1], len(weight))
        else:
            out = cpu_int4_linear(x, weight, scale, None, self.group_size)
            if (size := layer.num_embeddings_per_partition) != out.shape[-1]:
                out = out[..., :size].contiguous()
        return out if bias is None else out + bias

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Return the embedding itself as the head: ``apply`` works on it."""
        return embed_tokens


def int4pack_rows(
    packed: torch.Tensor, scale_zero: torch.Tensor, ids: torch.Tensor, block: int, halves: bool
) -> torch.Tensor:
    """Return some rows of a symmetric weight, [M, K] in the type of the scales.

    Args:
        packed: int4pack codes, uint8 [N, K/2]. N is a multiple of ``block``.
        scale_zero: [K/g, N, 2].
        ids: Rows, int64 [M].
        block: See ``int4pack_layout``.
        halves: See ``int4pack_layout``.
    """
    n, k, half = packed.shape[0], packed.shape[1] * 2, block // 2
    place = ids % block
    byte, high = (place % half, place // half) if halves else (place // 2, place % 2)
    codes = packed.view(n // block, k, half)[ids // block, :, byte]
    codes = (codes >> (4 * high).to(torch.uint8)[:, None]) & 15
    scale = scale_zero[:, :, 0].t()[ids]
    groups = (codes.float() - 8).view(len(ids), scale.shape[1], k // scale.shape[1])
    return (groups * scale.float()[..., None]).to(scale.dtype).view(len(ids), k)


def embedding_kernel(config: VllmConfig, weights: Any) -> str:
    """Return what serves quantized embeddings, as one line.

    Args:
        config: vLLM's own, of this engine.
        weights: their compressed-tensors arguments.
    """
    hf_config = language_config(config.model_config.hf_config)
    grid = "one scale per token" if weights.num_bits == 8 else f"groups of {weights.group_size}"
    gemm = "torch's int8 GEMM" if weights.num_bits == 8 else "as CpuInt4LinearKernel"
    tied = "tied, one copy" if hf_config.tie_word_embeddings else "not tied"
    return (
        f"lookup of rows; lm_head {gemm}, bf16 activations; {hf_config.vocab_size} x "
        f"{hf_config.hidden_size}, {weights.num_bits} bits, {grid}; {tied}"
    )


def embedding_problems(config: VllmConfig, weights: Any) -> list[str]:
    """List what keeps an engine from quantized embeddings.

    Args:
        config: vLLM's own, of this engine.
        weights: their compressed-tensors arguments; None: they are not quantized.
    """
    if weights is None:
        return []
    hint = "or quantize without them (embeddings=none)"
    problems = [f"quantized embeddings: {found}, {hint}" for found in _problems(config, weights)]
    model = config.model_config
    if model.word_embeddings_untied_by_checkpoint:
        folder = local_folder(model.model, model.revision, config.load_config.download_dir)
        if folder is not None:  # else the loader asks
            with suppress(CompressError):  # no checkpoint, which the loader refuses
                if problem := second_copy_problem(model, Checkpoint(folder)):
                    problems.append(problem)
    return problems


def second_copy_problem(model: ModelConfig, checkpoint: Checkpoint) -> str | None:
    """Say why the embeddings of a tied model with an equal lm_head.weight cannot be quantized.

    vLLM unties the two and ties them again only at 16 bits, so int8 would save nothing.

    Args:
        model: vLLM's own config.
        checkpoint: what the engine loads.

    Returns:
        The problem; None: there is none.
    """
    if not model.word_embeddings_untied_by_checkpoint or checkpoint.own_head:
        return None
    return (
        "quantized embeddings: lm_head.weight of the checkpoint equals the embedding that it is "
        "tied to, and vLLM would hold both copies; write a checkpoint with one copy by "
        "`vllm-compress quantize` with the same settings and serve that, or remove lm_head.weight "
        "from the checkpoint, or quantize without them (embeddings=none)"
    )


def _problems(config: VllmConfig, weights: Any) -> Iterator[str]:
    model, speculative = config.model_config, config.speculative_config
    if not _known(weights):
        yield (
            "the checkpoint has others than this plugin writes (8 bits with one scale per token, "
            "or 4 bits in symmetric groups)"
        )
    if not current_platform.is_cpu():
        yield (
            "vLLM's GPU kernels keep weights in tiles, from which no row is looked up; serve on a "
            "CPU"
        )
    elif weights.num_bits == 4 and int4pack_layout() is None:
        yield "torch packs int4 weights here in an order that this plugin does not know; use int8"
    if model.dtype != torch.bfloat16:
        yield f"they run in bfloat16, not {model.dtype}; serve with --dtype bfloat16"
    if model.runner_type != "generate":
        yield f"they were never tested with --runner {model.runner_type}; remove the flag"
    elif model.head_dtype != model.dtype:
        yield (
            f"an lm_head in {model.head_dtype} needs 16-bit weights; remove head_dtype from "
            "--hf-overrides"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        yield (
            "they were never tested with --pipeline-parallel-size above 1; use "
            "--tensor-parallel-size"
        )
    if config.lora_config is not None:
        yield "vLLM's LoRA layers read 16-bit embeddings; remove --enable-lora"
    if speculative is not None and speculative.method not in _DRAFTS_OF_TEXT:
        yield (
            f"drafts of {speculative.method!r} share 16-bit embeddings; use "
            f"{' or '.join(_DRAFTS_OF_TEXT)} in --speculative-config"
        )


def _known(weights: Any) -> bool:
    per_row = weights.num_bits == 8 and weights.strategy == "channel"
    grouped = weights.num_bits == 4 and weights.strategy == "group" and bool(weights.group_size)
    return bool(weights.symmetric) and (per_row or grouped)
