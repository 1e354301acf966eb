# SPDX-License-Identifier: Apache-2.0
"""vLLM's own scheduler without an engine: a worker that computes nothing and samples one token."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

SHAPE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.bfloat16}


class Serving:
    """A scheduler over groups of layers, and what it decides.

    Args:
        config: Of an engine, as the config edge leaves it.
        specs: One per group of layers.
        blocks: Of the pool.
        budget: Tokens of a step.
    """

    def __init__(
        self, config: VllmConfig, specs: Sequence[KVCacheSpec], blocks: int, budget: int
    ) -> None:
        init_none_hash(sha256)
        groups = [KVCacheGroupSpec([f"layer.{at}"], spec) for at, spec in enumerate(specs)]
        cache = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=groups,
            prefix_cache_retention_interval=config.cache_config.prefix_cache_retention_interval,
        )
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.max_num_scheduled_tokens = budget
        size, self._hash_size = resolve_kv_cache_block_sizes(cache, config)
        self.scheduler = Scheduler(
            config, cache, StructuredOutputManager(config), size, self._hash_size
        )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.hits: dict[str, int] = {}  # tokens, of each request's first step
        self.cuts: dict[str, list[int]] = {}  # computed tokens after each step

    def add(self, name: str, prompt: Sequence[int], tokens: int = 1, **extra: Any) -> None:
        """Queue a request."""
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra or None)
        hasher = get_request_block_hasher(self._hash_size, sha256)
        request = Request(name, list(prompt), sampling, None, block_hasher=hasher)
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        """Schedule a step and settle it."""
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self.hits[new.req_id] = new.num_computed_tokens
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        for one in requests:
            self.cuts.setdefault(one.request_id, []).append(one.num_computed_tokens)
        sampled = [[7] if one.num_computed_tokens >= one.num_tokens else [] for one in requests]
        rows = {name: row for row, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
        return output

    def abort(self, name: str) -> None:
        """End a request from outside."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def finish(self) -> None:
        """Serve what is queued, to the end."""
        while self.scheduler.has_unfinished_requests():
            self.step()

    def serve(self, name: str, prompt: Sequence[int], tokens: int = 1, **extra: Any) -> int:
        """Serve one request alone; the tokens that it hit."""
        self.add(name, prompt, tokens, **extra)
        self.finish()
        return self.hits[name]

    @property
    def free(self) -> int:
        """Free blocks."""
        return self.pool.get_num_free_blocks()
