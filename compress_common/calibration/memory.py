# SPDX-License-Identifier: Apache-2.0
"""The memory that calibration takes, and a refusal where it cannot fit."""

from typing import Any

import torch

from compress_common.calibration.precision import WHOLE, computed_in, total_memory
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import LimitError
from compress_common.structure.derive import known_structure

# What Python, torch and transformers take after the import and a first pass, measured on x86.
PROGRAM = 700 << 20
_STATE_BYTES = 2  # of a hidden state, at the least


def working_memory(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", *, calibrates: bool = True
) -> tuple[int, int]:
    """Return the bytes of the process besides the mapped weights, and those of the weights.

    Besides the weights there are the program and fp32 copies of one block and of the head. Weights
    are mapped from their files, so the system can drop them, unless the whole model is converted.

    Args:
        checkpoint: What is quantized.
        device: Where decoder blocks are computed.
        calibrates: Whether the model runs.
    """
    shapes, names = checkpoint.shapes(), checkpoint.names
    total = sum(size for _, size in shapes.values())
    layers = max(int(checkpoint.hf_config.num_hidden_layers or 1), 1)
    inner = ((names.inner(name) or "", *entry) for name, entry in shapes.items())
    linears = sum(size for name, shape, size in inner if "layers." in name and len(shape) == 2)
    own = PROGRAM + 6 * linears // layers
    if calibrates and (structure := known_structure(checkpoint.hf_config)) is not None:
        # transformers stacks the experts once, before they are used from their files again.
        ends = tuple(f".{name}.weight" for name in structure.routed)
        own = max(own, PROGRAM + sum(s for n, (_, s) in shapes.items() if n.endswith(ends)))
    if calibrates and computed_in(total, device):
        if total <= WHOLE:
            return own + 2 * total, 0
        config: Any = checkpoint.hf_config
        own += 4 * config.vocab_size * config.hidden_size
    return own, total


def check_memory(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    *,
    calibrates: bool = True,
    states: int = 0,
) -> None:
    """Raise CompressError when this machine, or its container, has too little memory.

    Args:
        checkpoint: What is quantized.
        device: Where decoder blocks are computed.
        calibrates: Whether the model runs.
        states: Hidden states that stay in memory: tokens, times the blocks before which they stay.
    """
    config: Any = checkpoint.hf_config
    need, _ = working_memory(checkpoint, device, calibrates=calibrates)
    need += states * config.hidden_size * _STATE_BYTES
    if need > (have := total_memory()):
        fewer = "; give fewer or shorter samples" if states else ""
        raise LimitError(
            f"not enough memory: about {need / 2**30:.1f} GiB are needed besides the weights, and "
            f"this machine or its container has {have / 2**30:.1f} GiB{fewer}, or use a machine "
            "with more"
        )
