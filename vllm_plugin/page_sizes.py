# SPDX-License-Identifier: Apache-2.0
"""Blocks of models whose full attention has other heads than their sliding windows (Gemma 4).

vLLM gives the pages of all layers one size, so that one pool serves them. Layers whose tokens take
fewer bytes get larger blocks. A layout counts whole blocks, so it must know the size beforehand. No
import of vLLM: ``plan`` does without it.
"""

from typing import Any

from compress_common.errors import CompressError
from vllm_plugin.kv_fingerprint import full_attention_layers, layer_configs


def block_sizes(config: Any, block_size: int, tensor_parallel: int = 1) -> tuple[int, int]:
    """Find the block sizes that make all pages equal.

    Args:
        config: the text model's.
        block_size: tokens per block, of the layers whose tokens take most.
        tensor_parallel: number of ranks, which share the KV heads of each layer.

    Returns:
        Tokens of a block in layers with full attention, and in the others.

    Raises:
        CompressError: no whole number of tokens does it, or layers differ in more than that.
    """
    if not getattr(config, "is_heterogeneous", False):
        return block_size, block_size
    full = full_attention_layers(config)
    sizes: tuple[set[int], set[int]] = set(), set()
    for layer, one in enumerate(layer_configs(config)):
        heads = max(1, one.num_key_value_heads // tensor_parallel)
        sizes[layer not in full].add(heads * one.head_dim)
    if not all(sizes):
        return block_size, block_size
    (compressed, *more), (other, *others) = sizes
    large, small = max(compressed, other), min(compressed, other)
    if more or others or large % small:
        ranks = f" on each of {tensor_parallel} ranks" if tensor_parallel > 1 else ""
        raise CompressError(
            f"a token has {' or '.join(map(str, sorted(sizes[0])))} numbers in layers with full "
            f"attention and {' or '.join(map(str, sorted(sizes[1])))} in the others{ranks}: their "
            "pages cannot be made equal by whole blocks; remove compress.kv"
        )
    return block_size * (large // compressed), block_size * (large // other)


def full_block_size(config: Any, block_size: int, tensor_parallel: int = 1) -> int:
    """Tokens of a block in layers with full attention: see ``block_sizes``."""
    return block_sizes(config, block_size, tensor_parallel)[0]
