# SPDX-License-Identifier: Apache-2.0
"""What a setting takes of a device, as `plan` counts it."""

import math
from dataclasses import dataclass
from typing import Any, Final

from vllm_plugin.capacity.blocks import RequestBlocks
from vllm_plugin.commands.common import Problems
from vllm_plugin.commands.deployment import Load, compare, default_block_size

BATCH: Final = 8192  # tokens per step
_ENDLESS: Final = (
    1 << 60
)  # bytes: more than any setting takes, so that what it takes is the difference


@dataclass(frozen=True)
class Size:
    """What a setting takes, in bytes.

    Attributes:
        fixed: weights, activations, and what is kept free beside the KV cache.
        page: a block of the KV cache.
        blocks: of one request.
        utilization: share of the device that vLLM may use.
    """

    fixed: int
    page: int
    blocks: RequestBlocks
    utilization: float

    def needs(self, requests: int) -> int:
        """Bytes of a device that serves so many requests, one of them in prefill."""
        taken = 1 + self.blocks.peak + (requests - 1) * self.blocks.decoding
        return math.ceil((self.fixed + taken * self.page) / self.utilization)

    @property
    def least(self) -> int:
        """Bytes of a device that has room for everything but a KV cache."""
        return math.ceil(self.fixed / self.utilization)

    def requests(self, memory: int) -> int:
        """How many requests a device serves, one of them in prefill."""
        room = int(memory * self.utilization) - self.fixed
        return self.blocks.one_in_prefill(max(0, room) // self.page)


def size_of(
    model: str,
    quantization: str | None,
    additional_config: dict[str, Any],
    context: int,
    prompt: int,
    utilization: float,
    concurrency: int = 1,
) -> Size:
    """Count what a setting takes, from the config and the headers of the weights.

    Args:
        model: a folder.
        quantization: a weight method, or None.
        additional_config: as for ``vllm serve``.
        context: tokens of a request when it ends.
        prompt: how many of them are prompt.
        utilization: share of the device that vLLM may use.
        concurrency: requests at once; vLLM's default if that is more.

    Raises:
        CompressError: lists why this setting cannot serve the model.
    """
    block_size = default_block_size(additional_config)
    load = Load(context, prompt, block_size, BATCH, max(Load.sequences, concurrency))
    found = compare(
        model,
        load,
        _ENDLESS,
        quantization=quantization,
        additional_config=additional_config,
        packing="checkpoint",
        activation_memory=None,
        problems=Problems(),
    )
    column = found.compressed
    blocks = RequestBlocks(column.peak_blocks, column.decoding_blocks)
    return Size(_ENDLESS - column.kv_memory, column.block_bytes, blocks, utilization)
