# SPDX-License-Identifier: Apache-2.0
"""Memory that choosing tokens takes beside the KV cache: what an engine keeps free for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kv_policies.base import KVPolicy
from kv_policies.compaction import observed_bytes, workspace
from kv_policies.layout.base import Layout
from kv_policies.recent_queries import RecentQueries
from kv_policies.window_policy import window_queries
from kv_policies.workspace import Heads


class Load(NamedTuple):
    """What an engine has to do at most.

    Attributes:
        longest: Tokens of a request.
        prompts: Prompts that are not complete after a step.
        requests: Requests that run at a time: ``--max-num-seqs``.
        fp8_queries: Tokens of a step whose queries can come in FP8, as beside an FP8 cache.
    """

    longest: int
    prompts: int
    requests: int
    fp8_queries: int = 0


class Beside(NamedTuple):
    """Bytes on one rank.

    Attributes:
        work: Of the work on one layer at a time.
        observed: What was seen of prompts that are not complete, in all layers.
        queries: Last queries of each request, in all layers, which score its decode windows.
        step: A step's queries of one layer, from FP8 to 16 bits.
    """

    work: int = 0
    observed: int = 0
    queries: int = 0
    step: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def beside_cache(
    policy: KVPolicy, layouts: Sequence[Layout], heads: Heads, load: Load, dtype: torch.dtype
) -> Beside:
    """Compute the most bytes that compaction takes beside the KV cache.

    Args:
        policy: What scores.
        layouts: Of each compressed layer on the rank.
        heads: Of a layer on the rank. They are the same in all layers.
        load: What the engine has to do.
        dtype: Of queries.
    """
    compacted = [layout for layout in layouts if layout.share != 1]
    if not compacted:
        return Beside()
    queries = observed = longest = 0
    for layout in compacted:
        count, query_heads = window_queries(policy, layout), heads.kv * heads.group
        queries += RecentQueries.bytes(count, load.requests, query_heads, heads.size, dtype)
        segment = layout.most_columns(load.longest, 0) * layout.block_size
        observed += load.prompts * observed_bytes(policy, heads, segment)
        longest = max(longest, segment)
    step = load.fp8_queries * heads.kv * heads.group * heads.size * dtype.itemsize
    return Beside(workspace(policy, heads).peak(longest), observed, queries, step)
