# SPDX-License-Identifier: Apache-2.0
"""The names that a checkpoint gives to the parameters of a layer with stacked experts.

They are found by running the conversion with which ``transformers`` saves a model, on numbers that
say where they come from. No list of models is needed.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from compress_common.errors import CompressError

STACKED = 3  # dimensions of a stack of experts: experts, outputs, inputs
_NEXT = 1 << 32  # between the numbers of two stacks: more than a stack has rows


@dataclass(frozen=True)
class Rows:
    """Rows of one expert of a stack, which a checkpoint holds as one matrix.

    Attributes:
        stack: Full name of the parameter.
        expert: Index of the expert.
        start, stop: Its rows.
    """

    stack: str
    expert: int
    start: int
    stop: int


def saved_names(model: nn.Module, layer: str, stack: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return how a checkpoint holds the parameters of a layer.

    Args:
        model: A ``transformers`` model. Its weights are not read.
        layer: Full name of the layer.
        stack: Full name of the module that has the stacks.

    Returns:
        ``{tensor: rows}`` of each tensor that holds rows of a stack, and ``{module: its name in the
        checkpoint}`` of the modules that have another one there.

    Raises:
        CompressError: A tensor of the checkpoint holds something else of a stack.
    """
    state: dict[str, torch.Tensor] = {}
    names: list[str] = []
    heights: dict[str, int] = {}  # of the stacks
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{layer}."):
            continue
        rows = [1]
        if name.rpartition(".")[0] == stack and parameter.ndim == STACKED:
            rows, heights[name] = list(parameter.shape[:2]), parameter.shape[1]
        numbers = torch.arange(prod(rows), dtype=torch.float64) + len(names) * _NEXT
        # Two columns: a conversion drops a dimension of one.
        state[name] = numbers.view(*rows, 1).expand(*rows, 2)
        names.append(name)
    places: dict[str, Rows] = {}
    renamed: dict[str, str] = {}
    for tensor, numbers in _saved(model, state).items():
        first = int(numbers.flatten()[0])
        name = names[first // _NEXT]
        if name in heights:
            places[tensor] = _rows(tensor, numbers, name, first % _NEXT, heights[name])
            continue
        before, after = name.rpartition(".")[0], tensor.rpartition(".")[0]
        if before != after and before.count(".") == after.count("."):
            renamed[before] = after
    return places, renamed


def _rows(tensor: str, numbers: torch.Tensor, stack: str, first: int, height: int) -> Rows:
    """Return the rows that a tensor of a checkpoint holds."""
    expected = torch.arange(len(numbers), dtype=numbers.dtype) + numbers.flatten()[0]
    expert, start = divmod(first, height)
    if (
        numbers.ndim != 2
        or not torch.equal(numbers[:, 0], expected)
        or start + len(numbers) > height
    ):  # noqa: PLR2004
        raise CompressError(
            f"its checkpoints do not hold one matrix for each projection of each expert, but "
            f"{tensor}, for one, for all experts of a layer, which is not supported"
        )
    return Rows(stack, expert, start, start + len(numbers))


def _saved(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a state, by the conversion of the model's kind."""
    from transformers.core_model_loading import revert_weight_conversion

    own = vars(model).pop("_weight_conversions", None)  # that of the files a model came from
    try:
        return revert_weight_conversion(model, state)
    except Exception as error:  # anything that a conversion can raise
        raise CompressError(
            f"transformers does not tell how checkpoints hold its experts ({error})"
        ) from error
    finally:
        if own is not None:
            model._weight_conversions = own
