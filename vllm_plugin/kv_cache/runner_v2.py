# SPDX-License-Identifier: Apache-2.0
"""vLLM's second model runner, with prompts outside of decode graphs."""

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class CompressedRunnerV2(GPUModelRunner):
    """As ``CompressedRunnerV1``."""

    def gather_batch_req_state(self, *args: Any, **kwargs: Any) -> Any:
        state, uniform = super().gather_batch_req_state(*args, **kwargs)
        # Only a batch of so many tokens per request, all decodes, replays a decode graph.
        return state, None if state is not None and state.has_prefill else uniform
