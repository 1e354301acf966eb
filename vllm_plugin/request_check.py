# SPDX-License-Identifier: Apache-2.0
"""Checks of a request's parameters before it is admitted, for either of vLLM's model runners.

A logits processor is vLLM's seam for such a check. Each runner has an interface of its own and
refuses classes that do not implement it.
"""

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

PREFIX = "compress_"
# Similarity above which another key is taken for a misspelling of one of ours. 0.8 catches a few
# wrong letters, and lets compression_level of another plugin pass.
_SIMILAR = 0.8


class RequestCheck(LogitsProcessor, LogitsProcessorV2):
    """A logits processor that touches no logits.

    Subclasses implement ``validate_params``. It raises ValueError, which is HTTP 400.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, *args: Any) -> bool:
        return False

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits


def misspelt(keys: Collection[str], allowed: Collection[str]) -> list[str]:
    """Find keys that were meant for this plugin and that it does not know.

    A key is meant for us if it has our prefix, or if it is nearly one of ours. Any other key
    belongs to somebody else and passes.

    Args:
        keys: Names in a request's ``vllm_xargs`` or ``extra_args``.
        allowed: Names that a request may set.

    Returns:
        One message for each such key. The caller adds what a request may set.
    """
    problems = []
    for key in keys:
        if key in allowed:
            continue
        plain = _plain(key)
        near = get_close_matches(plain, allowed, n=1, cutoff=_SIMILAR)
        if near or plain.startswith(PREFIX):
            problems.append(
                f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
    return problems


def _plain(key: str) -> str:
    """``compressKeep``, ``Compress-Keep`` and ``compress keep`` as ``compress_keep``."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
