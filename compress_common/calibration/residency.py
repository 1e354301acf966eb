# SPDX-License-Identifier: Apache-2.0
"""Copies of a module's tensors on another device or in another type, while they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress_common.structure.structure import Structure


@contextmanager
def copied(
    module: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Let a module compute with copies while the context lasts, and put its own tensors back.

    Args:
        module: Whose parameters and buffers are copied, unless they are there already.
        device: Where to; None: they stay where they are.
        dtype: Of floating-point copies; None: they keep their own.
    """
    own: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    try:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    kind = dtype if tensor.is_floating_point() else None
                    there = tensor.detach().to(device or tensor.device, kind or tensor.dtype)
                    if there.device == tensor.device and there.dtype == tensor.dtype:
                        continue
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=tensor.requires_grad)
                    own.append((tensors, name, tensor))
                    tensors[name] = there
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


def widen(model: Any, structure: Structure, dtype: torch.dtype) -> None:
    """Let a 16-bit model compute in a wider type, with a copy of one module at a time.

    What it computes equals that of the whole model in that type, bit for bit: 16-bit numbers are
    exact there. Modules are the embedding, each decoder block, the last norm and the head.

    Args:
        model: A ``transformers`` causal language model.
        structure: Of the model.
        dtype: What it computes in.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma rounds it to the type of its weight
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=dtype)
    _widen_rows(embedding, dtype)
    norm = () if structure.norm is None else (model.get_submodule(structure.norm),)
    for module in (*model.get_submodule(structure.layers), *norm, head):
        _widen(module, dtype)


def _widen(module: Any, dtype: torch.dtype) -> None:
    """Give a module copies for as long as each call lasts."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with copied(module, dtype=dtype):
            return own(*args, **kwargs)

    module.forward = forward


def _widen_rows(embedding: Any, dtype: torch.dtype) -> None:
    """As ``_widen``, with the rows that the tokens of a call need."""
    own = embedding.forward

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        weight, padding = embedding.weight, embedding.padding_idx
        rows, places = tokens.unique(return_inverse=True)
        try:
            embedding.weight = nn.Parameter(weight.detach()[rows].to(dtype), requires_grad=False)
            embedding.padding_idx = None  # only says where no gradient goes
            return own(places)
        finally:
            embedding.weight, embedding.padding_idx = weight, padding

    embedding.forward = forward
