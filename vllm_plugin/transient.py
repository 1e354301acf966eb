# SPDX-License-Identifier: Apache-2.0
"""Memory that a step of ours takes beside the KV cache, and that vLLM's profile run does not see.

vLLM sizes the KV cache by running the model once on made-up inputs. That run does not compress or
denoise, so a worker that does calls ``reserve`` to keep the memory for its own step out of the
cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import format_gib

from compress_common.errors import CompressError

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown


def reserve(worker: Any, measure: Callable[[], int], needed: int, purpose: str, flags: str) -> int:
    """Return the bytes that are left for a worker's KV cache.

    Args:
        worker: The vLLM worker, on CPU or GPU, with its model loaded and no cache allocated yet.
        measure: vLLM's own ``determine_available_memory``.
        needed: The most bytes that a step of ours takes at once on this rank.
        purpose: What needs them, for the log.
        flags: What lowers ``needed``, for the message.

    Raises:
        CompressError: If the cache and the step do not fit in memory together.
    """
    # Asked first: a startup plan of vLLM sets the same field, to a size that was measured before
    # and does not know of us.
    fixed = worker.cache_config.kv_cache_memory_bytes
    available = measure()
    if not needed:
        return available
    left = left_for_cache(available, needed, purpose, flags, fixed, _free() if fixed else 0)
    if fixed:
        logger.info(
            "%s takes up to %s GiB beside the KV cache, which has a fixed size of %s GiB",
            purpose,
            format_gib(needed),
            format_gib(fixed),
        )
    else:
        logger.info(
            "%s GiB are kept free for %s; %s GiB are left for the KV cache",
            format_gib(needed),
            purpose,
            format_gib(left),
        )
    return left


def left_for_cache(
    available: int, needed: int, purpose: str, flags: str, fixed: int | None, free: int
) -> int:
    """Return the bytes for a KV cache.

    Args:
        available: Bytes that vLLM would give to the cache.
        needed: Bytes to keep out of it.
        purpose: What needs them, for the message.
        flags: What lowers ``needed``, for the message.
        fixed: Bytes of the cache if an operator has fixed them. Such a cache keeps its size, so
            ``needed`` must fit beside it.
        free: Bytes of memory that are free before the cache is allocated. Read only with ``fixed``.

    Raises:
        CompressError: If nothing is left for the cache, or a fixed one leaves too little.
    """
    if fixed:
        if fixed + needed > free:
            raise CompressError(
                f"a KV cache of {format_gib(fixed)} GiB and {format_gib(needed)} GiB for {purpose} "
                f"do not fit in the {format_gib(free)} GiB of memory that are free; lower "
                f"--kv-cache-memory-bytes (VLLM_CPU_KVCACHE_SPACE on CPU) or {flags}"
            )
        return available
    if needed >= available:
        raise CompressError(
            f"{purpose} needs {format_gib(needed)} GiB of memory, of the {format_gib(available)} "
            "GiB that the weights leave; raise --gpu-memory-utilization (which also counts on "
            f"CPU), or lower {flags}"
        )
    return available - needed


def _free() -> int:
    if current_platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

        node = get_allowed_cpu_list()[0].numa_node  # as vLLM's CPU worker takes it
        return int(get_memory_node_info(node).available_memory)
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + unused
