# SPDX-License-Identifier: Apache-2.0
"""vLLM's first model runner, with prompts outside of decode graphs."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class CompressedRunnerV1(GPUModelRunner):
    """Computes prompts eagerly or in pieces, also where each request computes one token.

    vLLM takes the last chunk of a prompt for a decode when it is one token. Prompts are compacted
    in the forward pass, with their queries, which the replay of a decode graph would leave out.
    """

    def _determine_batch_execution_and_padding(
        self, *args: Any, force_uniform_decode: bool | None = None, **kwargs: Any
    ) -> Any:
        if force_uniform_decode is None and self._computes_prompts():  # not a dummy run
            force_uniform_decode = False
        return super()._determine_batch_execution_and_padding(
            *args, force_uniform_decode=force_uniform_decode, **kwargs
        )

    def _computes_prompts(self) -> bool:
        """Whether a request of this step has tokens of its prompt left to compute."""
        batch = self.input_batch
        rows = slice(batch.num_reqs)
        return bool((batch.num_computed_tokens_cpu[rows] < batch.num_prompt_tokens[rows]).any())
