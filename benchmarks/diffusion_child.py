# SPDX-License-Identifier: Apache-2.0
"""The part of the diffusion benchmark that runs in an engine's process."""

import random
import time
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams, TokensPrompt

from benchmarks.engine_child import Child


class DiffusionChild(Child):
    """One engine that denoises."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        core = self.engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        self._graphs, model = len(worker.forward.shapes), worker.model_runner.get_model()
        self._forward, self._begun = 0.0, 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def started(self) -> dict[str, Any]:
        return {"graphs": self._graphs}

    def denoise(
        self,
        shapes: Sequence[tuple[int, int]],
        seed: int,
        alone: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """Run requests, of which none ends early.

        Args:
            shapes: Tokens of each request's prompt and canvas.
            seed: Of the random prompts.
            alone: Run one request after the other.
            extra: ``extra_args`` of the requests.

        Returns:
            ``tokens_per_s`` and ``overhead_share``.
        """
        draw = random.Random(seed)
        self._forward = spent = 0.0
        for index, (prompt, canvas) in enumerate(shapes):
            tokens = [draw.randrange(10) for _ in range(prompt)]
            params = SamplingParams(
                temperature=0,
                max_tokens=canvas,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            self.engine.add_request(
                f"{self.requests}-{index}", TokensPrompt(prompt_token_ids=tokens), params
            )
            if alone:
                spent += self._drain()
        spent += self._drain()
        self.requests += 1
        return {
            "tokens_per_s": sum(canvas for _, canvas in shapes) / spent,
            "overhead_share": 1 - self._forward / spent,
        }

    def _drain(self) -> float:
        begin = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - begin

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._forward += time.perf_counter() - self._begun
