# SPDX-License-Identifier: Apache-2.0
"""The two linears through which a block adds to the hidden states, proved by running the block."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from compress_common.calibration.blocks import Blocks
from compress_common.errors import CompressError

_TOKENS = 16
_CLOSE = 2e-2  # of 16-bit matrix products


@dataclass(frozen=True)
class Writers:
    """What a block adds to its input: ``scale * (attention's output + MLP's output)``.

    Attributes:
        attention: Name of the linear that gives attention's output.
        mlp: Name of the linear that gives the MLP's output.
        scale: Of both.
    """

    attention: str
    mlp: str
    scale: float


class _Reached(Exception):
    """Ends a pass through a block where its rest is of no use."""


@torch.no_grad()
def writers_of(blocks: Blocks) -> Writers:
    """Return the writers of a decoder's blocks.

    Args:
        blocks: With calibration tokens.

    Raises:
        CompressError: A block adds something else, such as normalized outputs.
    """
    structure = blocks.structure
    attention = structure.attention.output if structure.attention is not None else None
    layer = structure.layer(0)
    others = [n for n in layer.names if n in layer.row_parallel and n != attention]
    if attention is None or len(others) != 1:
        raise _refused(structure.model_type, "there is no single linear behind attention and MLP")
    scale = float(getattr(blocks.model.config, "residual_multiplier", None) or 1.0)
    writers = Writers(attention, others[0], scale)
    small = blocks.on(blocks.tokens[:1, :_TOKENS])
    hidden = small.inputs()
    for index in range(len(small)):
        with small.resident(index), captured(small, index, (attention, others[0])) as seen:
            out = small.run(index, hidden)
            added = sum(written(small, index, name, seen[name]) for name in seen)
        error = _error(hidden, out, scale * added)
        if len(seen) != 2 or error > _CLOSE:  # noqa: PLR2004 (the two writers)
            raise _refused(structure.model_type, f"block {index} adds something else")
        hidden = out
    return writers


def _error(before: torch.Tensor, after: torch.Tensor, added: torch.Tensor) -> float:
    """Return how far the change of hidden states is from what was added, relative to the change.

    Each of two sums is rounded to the type of the states. In 16 bits that is more than what a block
    adds where a state is very large, as those of a few tokens are, so it does not count.
    """
    old, new = (state.flatten(0, 1).to(added.device) for state in (before, after))
    rounding = 2 * torch.finfo(new.dtype).eps * torch.maximum(old.abs(), new.abs()).float()
    change = new.float() - old.float()
    error = ((added - change).abs() - rounding).clamp(min=0)
    return float(error.norm() / change.norm().clamp(min=1e-9))


def _refused(model_type: str, why: str) -> CompressError:
    return CompressError(
        f"model_type {model_type!r} cannot be healed by refit or linear: both need blocks that add "
        f"the outputs of two linears to the hidden states, and {why} (a norm behind them, for "
        "one); give --heal fusegpt or --heal none"
    )


@contextmanager
def captured(
    blocks: Blocks, index: int, names: tuple[str, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dictionary that gets what the named linears of a block read, fp32 [tokens, K]."""
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        seen[name] = x.flatten(0, -2).float()

    with blocks.watch(index, names, see):
        yield seen


def read_by(blocks: Blocks, index: int, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a linear of a resident block reads, fp32 [tokens, K]. The rest is not run.

    Args:
        blocks: The decoder.
        index: Of the block.
        name: Of the linear.
        hidden: Input of the block on its device, [samples, length, hidden].
    """
    seen: list[torch.Tensor] = []

    def see(_: str, x: torch.Tensor) -> None:
        seen.append(x.flatten(0, -2).float())
        raise _Reached

    with blocks.watch(index, (name,), see), suppress(_Reached):
        blocks.output(index, hidden)
    return seen[0]


def written(blocks: Blocks, index: int, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear of a resident block gives, fp32 [tokens, hidden].

    Args:
        blocks: The decoder.
        index: Of the block.
        name: Of the linear.
        x: What it reads, fp32 [tokens, K].
    """
    module = blocks.layers[index].get_submodule(name)
    bias = getattr(module, "bias", None)
    return linear(x, module.weight.float(), None if bias is None else bias.float())
