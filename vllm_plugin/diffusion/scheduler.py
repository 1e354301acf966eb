# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, for requests whose steps compute any number of their positions.

A request is admitted with blocks for its whole canvas, so that it never has to be preempted. A step
of a request is never split: one that does not fit the token budget waits. To vLLM's scheduler, the
canvas consists of tokens that exist from the start and are computed again in each step.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_plugin.diffusion.requests import canvas_length


class DiffusionScheduler(Scheduler):
    """Reserves blocks for canvases, and schedules the rows that the worker's policies planned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_sampled_tokens_per_step = 0  # as vLLM has it for its own diffusion models
        self._mask = self.vllm_config.model_config.hf_config.mask_token_id
        self._next_rows: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        """Append the canvas to the request, so that admission reserves its blocks."""
        if request.request_id not in self.requests:
            length = canvas_length(
                request.num_prompt_tokens, request.sampling_params, self.max_model_len
            )
            request.max_tokens = length  # a request can ask for more than fits the context
            request._all_token_ids.extend([self._mask] * length)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule the next step of each running request whose rows all fit the budget."""
        budget, known, self._next_rows = self.max_num_scheduled_tokens, self._next_rows, {}
        for request in self.running:
            rows = self._next_rows[request.request_id] = known[request.request_id]
            if rows > budget:
                rows = 0  # vLLM skips a request that has nothing to compute
            budget -= rows
            request.num_computed_tokens = request.num_tokens - rows
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the sizes of the next steps from the worker's output."""
        self._next_rows |= getattr(model_runner_output, "next_rows", {})
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Replace masks by the tokens that became final."""
        for count, token in enumerate(new_token_ids, 1):
            place = request.num_prompt_tokens + request.num_output_tokens
            request._all_token_ids[place] = token
            request._output_token_ids.append(token)
            # The canvas can have the longest allowed length from the start, which is no reason to
            # stop. ``max_tokens`` stops the request instead.
            if check_stop(request, self.max_model_len + 1):
                return new_token_ids[:count], True
        return new_token_ids, False
