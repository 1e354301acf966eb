# SPDX-License-Identifier: Apache-2.0
"""Validation of a request's parameters before it is admitted, for either of vLLM's model runners.

A logits processor is vLLM's seam for that. Each runner has an interface of its own and refuses
classes that do not have it.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2


class RequestCheck(LogitsProcessor, LogitsProcessorV2):
    """Touches no logits; subclasses have ``validate_params``, which raises ValueError, HTTP 400."""

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
