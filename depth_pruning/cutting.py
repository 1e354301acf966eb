# SPDX-License-Identifier: Apache-2.0
"""Pure functions that cut a checkpoint's config and tensor names to the blocks that stay."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from compress_common.consecutive import consecutive
from compress_common.errors import CompressError

MARKER = "vllm_compress_depth"  # a key of config.json
_DEPTH = "num_hidden_layers"
_MOST = 10_000  # blocks of a model
# Lists of a config that can be as long as the model is deep by chance.
_NOT_PER_LAYER = re.compile(r"(_token_ids?|_ids|architectures|_section)$")
_NUMBERED = re.compile(r"(.*?(?:^|\.))(\d+)\.")


def kept_blocks(depth: int, dropped: Collection[int]) -> tuple[int, ...]:
    """Return the indices of the blocks that stay, in order."""
    return tuple(index for index in range(depth) if index not in dropped)


def per_layer_keys(config: Mapping[str, Any], depth: int) -> list[str]:
    """Return the keys of a config that hold a list with an entry for each block.

    Args:
        config: As ``to_dict`` of a ``transformers`` config returns it.
        depth: How many blocks the model has.
    """
    return [
        key
        for key, value in config.items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and not _NOT_PER_LAYER.search(key)
    ]


def cut_config(
    written: Mapping[str, Any],
    complete: Mapping[str, Any],
    kept: Sequence[int],
    depth: int,
    depth_key: str = _DEPTH,
) -> dict[str, Any]:
    """Return the content of config.json of a model that has only some of its blocks.

    A list that ``transformers`` derives from the depth, such as ``layer_types``, would come out
    different for the cut model. So it is written down where entries of the whole list differ.

    Args:
        written: config.json as it is.
        complete: The same with what ``transformers`` adds.
        kept: Indices of the blocks that stay, in order.
        depth: How many blocks there were.
        depth_key: What the config calls the depth.
    """
    config = dict(written)
    if len(kept) == depth:
        return config
    for key in per_layer_keys(complete, depth):
        values = [complete[key][index] for index in kept]
        if key in written or any(value != complete[key][0] for value in complete[key]):
            config[key] = values
    for key in {_DEPTH, depth_key} & config.keys() | {depth_key}:
        config[key] = len(kept)
    # Qwen 2: blocks from this one on have a window. vLLM compares it with the depth.
    if isinstance(first := complete.get("max_window_layers"), int):
        config["max_window_layers"] = sum(index < first for index in kept)
    return config


def renamed(name: str, prefix: str, kept: Sequence[int], depth: int) -> str | None:
    """Return what a tensor is called in the cut model; None: it belongs to a dropped block.

    Args:
        name: Of the tensor in the checkpoint.
        prefix: What the names of all blocks start with, such as ``model.layers.``.
        kept: Indices of the blocks that stay, in order.
        depth: How many blocks there were. Blocks behind them, which predict further tokens, stay.
    """
    if not name.startswith(prefix):
        return name
    number, dot, rest = name.removeprefix(prefix).partition(".")
    if not number.isdecimal():
        return name
    index = int(number)
    if index >= depth:
        return f"{prefix}{index - depth + len(kept)}{dot}{rest}"
    return f"{prefix}{kept.index(index)}{dot}{rest}" if index in kept else None


def block_prefix(names: Iterable[str], depth: int) -> str:
    """Return what the names of all blocks start with, such as ``encoder.layer.``.

    Args:
        names: Of all tensors of a checkpoint.
        depth: How many blocks its config says it has.

    Raises:
        CompressError: No list of modules among the names has that many entries.
    """
    found: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
            count[match[1]] = count.get(match[1], 0) + 1
    fits = [prefix for prefix, numbers in found.items() if numbers == set(range(depth))]
    if not fits:
        raise CompressError(
            f"its tensors are not those of {depth} numbered blocks; give the config that belongs "
            "to the weights"
        )
    return max(fits, key=count.__getitem__)


def block_numbers(text: str) -> tuple[int, ...]:
    """Return the block indices of a text such as ``12-15`` or ``3,8-10``, in order.

    Raises:
        CompressError: It is not such a text.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise CompressError(f"--layers {text!r} is no list of blocks, such as 12-15 or 3,8-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= _MOST:
            raise CompressError(f"--layers {text!r}: no model has a block {last}")
        numbers |= set(range(first, last + 1))
    return tuple(sorted(numbers))


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as users write them: ``3,8-10``."""
    runs = consecutive(sorted(numbers))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
