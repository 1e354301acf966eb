# SPDX-License-Identifier: Apache-2.0
"""What calibration keeps on the compute device: the model and the hidden states, where they fit.

The sizes are estimates from shapes. A margin is added for what PyTorch rounds up and leaves unused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress_common.calibration.blocks import CHUNK_TOKENS
from compress_common.calibration.parts import free_memory
from compress_common.calibration.precision import check_device
from compress_common.errors import CompressError, LimitError

AUTO = "auto"
_ITEM = 2  # bytes of a number of the 16-bit model
# Stays free: a share of what is free, and at least so many bytes.
_SHARE, _LEAST = 0.1, 1 << 30
_ROUNDED = 1 << 23  # weights that GPTQ rounds at once where memory is short
_ROUNDED_BYTES = 28  # that each takes meanwhile
_SCORES_BYTES = 1 << 28  # of attention, in chunks


@dataclass(frozen=True)
class Sizes:
    """Bytes of a calibration.

    Attributes:
        model: The weights of the model.
        block: The largest decoder block of it.
        work: What is computed with beside them: activations of a chunk, Gram matrices, rounding,
            or the KV cache of sampling.
        states: The hidden states that stay between blocks.
    """

    model: int
    block: int
    work: int
    states: int


@dataclass(frozen=True)
class Placement:
    """Where a calibration keeps what.

    Attributes:
        device: What computes.
        model: Where the model lies.
        states: Where hidden states lie between blocks.
    """

    device: torch.device
    model: torch.device
    states: torch.device


HOST = torch.device("cpu")
ON_HOST = Placement(HOST, HOST, HOST)


def sizes_of(config: Any, weight_bytes: int, tokens: int, states: int | None = None) -> Sizes:
    """Return the sizes of a calibration.

    Args:
        config: The text model's ``transformers`` config.
        weight_bytes: Of all its tensors.
        tokens: Calibration tokens in all.
        states: Tokens times the blocks whose hidden states stay; None: the inputs of one block, and
            the output of the last.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list) else inner  # a model can have one for each layer
    count = config.num_attention_heads
    heads = count * (getattr(config, "head_dim", None) or hidden // count)
    kv = heads // count * (getattr(config, "num_key_value_heads", None) or count)
    widest = max(hidden, heads, inner)
    chunk = min(CHUNK_TOKENS, tokens)
    activations = chunk * (_ITEM * (4 * hidden + 2 * heads + 2 * kv + 3 * inner) + 8 * widest)
    grams = 4 * (2 * hidden**2 + heads**2 + inner**2 + widest**2)
    largest = max(2 * inner * hidden, (heads + 2 * kv) * hidden)  # a unit of stacked linears
    rounding = 2 * 4 * largest + _ROUNDED * _ROUNDED_BYTES
    sampling = tokens * layers * 2 * kv * _ITEM + 16 * config.vocab_size * min(tokens, 256)
    return Sizes(
        model=weight_bytes,
        block=weight_bytes // layers,
        work=max(activations + grams + rounding + _SCORES_BYTES, sampling),
        states=(2 * tokens if states is None else states) * hidden * _ITEM,
    )


def fitting(sizes: Sizes, free: int) -> tuple[bool, bool] | None:
    """Say whether the model and whether the hidden states fit a device.

    Args:
        sizes: Of the calibration.
        free: Bytes that can be allocated on the device.

    Returns:
        Whether each fits, the states first where only one does; None: not even one block fits.
    """
    usable = free - max(_LEAST, int(free * _SHARE))
    if sizes.model + sizes.work + sizes.states <= usable:
        return True, True
    if sizes.block + sizes.work + sizes.states <= usable:
        return False, True
    return (False, False) if sizes.block + sizes.work <= usable else None


def placed(device: str | torch.device, sizes: Sizes, *, whole: bool = False) -> Placement:
    """Return where a calibration keeps what.

    Args:
        device: What computes: not "auto".
        sizes: Of the calibration.
        whole: Whether it needs the whole model on the device.

    Raises:
        CompressError: The device cannot be used, or has too little free memory.
    """
    check_device(device)
    there = torch.empty(0, device=device).device
    if there.type == "cpu":
        return ON_HOST
    free = free_memory(there)
    if not free:  # not known: as little as possible
        return Placement(there, there if whole else HOST, HOST)
    fit = fitting(sizes, free)
    if fit is None or (whole and not fit[0]):
        need = sizes.work + (sizes.model + sizes.states if whole else sizes.block)
        raise LimitError(
            f"{there} has {free / 2**30:.1f} GiB free, and calibration needs about "
            f"{need / 2**30:.1f} GiB and {max(_LEAST, int(free * _SHARE)) / 2**30:.1f} GiB to "
            "spare; end what else uses it, give fewer or shorter samples, or calibrate on the CPU "
            "(`vllm-compress ... --device cpu`)"
        )
    model, states = fit
    return Placement(there, there if model else HOST, there if states else HOST)


def chosen_device(device: str, sizes: Callable[[], Sizes], *, whole: bool = False) -> str:
    """Return the device that a name stands for.

    Args:
        device: As the user gave it. "auto" is CUDA where there is a GPU and the work fits it, else
            the CPU.
        sizes: Returns those of the calibration. Called where there is a GPU to choose.
        whole: As in ``placed``.

    Raises:
        CompressError: PyTorch has no such device.
    """
    if device != AUTO:
        check_device(device)
        return device
    if not torch.cuda.is_available():
        return "cpu"
    try:
        placed("cuda", sizes(), whole=whole)
    except CompressError:
        return "cpu"
    return "cuda"
