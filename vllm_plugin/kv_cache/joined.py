# SPDX-License-Identifier: Apache-2.0
"""The caches of several layers as one, as vLLM allocates them: one piece of memory for all."""

import math
from collections.abc import Sequence

import torch

from kv_policies.windows import JoinedPages
from vllm_plugin.kv_cache.pages import Pages


def join(layers: Sequence[Pages]) -> JoinedPages | None:
    """Number the blocks of some layers together.

    Blocks of a layer may lie side by side, or all layers' parts of a block. Either way they begin
    at multiples of one distance, which becomes the step from one number to the next.

    Returns:
        None where layers differ in more than in where they begin, such as in scales, or their
        blocks would overlap.
    """
    if any(pages.quantized is not None for pages in layers):
        return None
    blocks = [pages.blocks for pages in layers]
    alike = {
        (x.untyped_storage().data_ptr(), x.dtype, x.shape, x.stride(), pages.orders)
        for x, pages in zip(blocks, layers, strict=True)
    }
    if len(alike) != 1:
        return None
    (count, elements), stride = blocks[0].shape, blocks[0].stride(0)
    offsets = [x.storage_offset() for x in blocks]
    base = min(offsets)
    distance = math.gcd(stride, *(offset - base for offset in offsets))
    if distance < elements:
        return None
    last = max(offsets) + (count - 1) * stride - base
    joined = blocks[0].as_strided((last // distance + 1, elements), (distance, 1), base)
    first = torch.tensor([(offset - base) // distance for offset in offsets], device=joined.device)
    keys, values = layers[0].orders
    pages = Pages(joined, keys, values, layers[0].shape)
    return JoinedPages(pages, first, stride // distance)
