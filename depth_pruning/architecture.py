# SPDX-License-Identifier: Apache-2.0
"""Which models can lose blocks: refusals before any weight is read."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import check_decoder
from compress_common.errors import CompressError
from compress_common.structure.derive import build, layers_of, structure_of
from depth_pruning.cutting import cut_config, kept_blocks, ranges

LARGEST_SHARE = 4  # a quarter of the blocks
# Names under which configs say that blocks read the keys and values of other blocks.
_SHARED_CACHE = ("num_kv_shared_layers", "use_cla", "cla_share_factor", "kv_sharing")
_POSITION = ("layer_idx", "layer_id", "layer_index", "training")  # may differ
_PLAIN = (bool, int, float, str, torch.Size)


def model_problems(checkpoint: Checkpoint) -> list[str]:
    """List what keeps a model from losing blocks. No weight is read."""
    config, problems = checkpoint.hf_config, []
    try:
        structure = structure_of(config)
        check_decoder(checkpoint)
    except CompressError as error:
        return error.problems
    if structure.has_experts:
        problems.append(
            "it has routed experts: dropping blocks of a mixture of experts was not tested; "
            "give a dense model"
        )
    if hasattr(config, "wrapper"):
        problems.append(
            "it is a model of images and text, whose vision tower can feed single blocks; give a "
            "language model"
        )
    if shared := [name for name in _SHARED_CACHE if getattr(config, name, None)]:
        problems.append(
            f"blocks share keys and values with other blocks ({shared[0]}), so a block cannot go "
            "alone; give a model in which each block has its own"
        )
    if not checkpoint.has_head:
        problems.append(
            "it has no language-model head, by whose logits the loss is measured; cut an embedding "
            "model with --keep-first"
        )
    return problems


def set_problems(dropped: Collection[int], depth: int, *, force: bool) -> list[str]:
    """List what is wrong with a set of blocks.

    Args:
        dropped: Their indices.
        depth: How many blocks the model has.
        force: Whether more than a quarter of them may go.
    """
    problems = []
    if outside := [index for index in dropped if not 0 <= index < depth]:
        problems.append(
            f"there is no block {ranges(outside)}: the model has the blocks 0 to {depth - 1}"
        )
    if ends := sorted({0, depth - 1} & set(dropped)):
        problems.append(
            f"block {' and block '.join(map(str, ends))} cannot be dropped: the first and the last "
            "block turn embeddings into hidden states and back; leave them out"
        )
    return problems + count_problems(len(dropped), depth, force=force)


def count_problems(count: int, depth: int, *, force: bool) -> list[str]:
    """List what is wrong with a number of blocks to drop: see ``set_problems``."""
    if count >= depth:
        return [f"{count} blocks cannot go: the model has {depth}; drop fewer"]
    if count > depth - 2:
        return [f"at most {depth - 2} of {depth} blocks can go: the first and the last one stay"]
    if count > depth // LARGEST_SHARE and not force:
        most = depth // LARGEST_SHARE
        told = (
            f"{count} of {depth} blocks are more than a quarter, after which few models are of use"
        )
        return [f"{told}; drop {most} or fewer, or give --force"]
    return []


def check_blocks(config: Any, written: dict[str, Any], dropped: Collection[int]) -> None:
    """Check that each block which stays is the same block in the cut model.

    A block can depend on its index: by a list of the config, or by arithmetic in its code. Both
    models are built without weights, and what their blocks hold is compared.

    Args:
        config: The ``transformers`` config of the model.
        written: The config.json of the cut model.
        dropped: Indices of the blocks that go.

    Raises:
        CompressError: A block would compute something else.
    """
    depth = config.num_hidden_layers
    kept = kept_blocks(depth, dropped)
    try:
        cut = type(config).from_dict(copy.deepcopy(written))
    except Exception as error:  # each class validates in its own way
        reason = str(error).strip().splitlines()[0][:200]
        raise CompressError(
            f"transformers refuses the config of the cut model ({reason}); this architecture has a "
            "setting for each block that is not known here"
        ) from error
    before, after = _blocks(build(config), depth), _blocks(build(cut), len(kept))
    for place, index in enumerate(kept):
        if (difference := _difference(before[index], after[place])) is not None:
            raise CompressError(
                f"block {index} would be block {place} of the cut model, and would differ in "
                f"{difference}: this architecture depends on the place of a block, and its config "
                "has no list that says otherwise"
            )


def complete_cut(checkpoint: Checkpoint, dropped: Collection[int]) -> dict[str, Any]:
    """Return the config.json of a model without some blocks, after ``check_blocks``."""
    config = checkpoint.hf_config
    depth = config.num_hidden_layers
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    kept = kept_blocks(depth, dropped)
    written = cut_config(checkpoint.config, config.to_dict(), kept, depth, key)
    if dropped:
        check_blocks(config, written, dropped)
    return written


def _blocks(model: nn.Module, depth: int) -> Sequence[nn.Module]:
    return list(model.get_submodule(layers_of(model, depth)))  # type: ignore[arg-type]


def _difference(before: nn.Module, after: nn.Module) -> str | None:
    """Return the name of the first thing in which two blocks differ; None: they are alike."""
    if (first := _content(before)) == (second := _content(after)):
        return None
    names = sorted(first.keys() ^ second.keys()) or [n for n in first if first[n] != second[n]]
    return names[0]


def _content(block: nn.Module) -> dict[str, Any]:
    """Return the shapes of a block's tensors, the types of its modules and their plain values."""
    found: dict[str, Any] = {f"{n}.shape": tuple(p.shape) for n, p in block.named_parameters()}
    for name, module in block.named_modules():
        found[name or "its class"] = type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, _PLAIN)
            if plain and not key.startswith("_") and key not in _POSITION:
                found[f"{name}.{key}".lstrip(".")] = value
    return found
