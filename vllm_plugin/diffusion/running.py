# SPDX-License-Identifier: Apache-2.0
"""The requests that a worker denoises, from admission to their end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from dllm_denoising.denoiser import Denoiser
from vllm_plugin.diffusion.requests import canvas_length, decoding_of
from vllm_plugin.diffusion.settings import DiffusionSettings


@dataclass(frozen=True)
class Running:
    """A request that is being denoised.

    Attributes:
        denoiser: Its canvas and policy.
        blocks: Cache blocks of its whole canvas, reserved when it was admitted, int64.
        slots: Place of each position in the cache, int64 [N].
    """

    denoiser: Denoiser
    blocks: np.ndarray
    slots: np.ndarray

    @classmethod
    def of(cls, denoiser: Denoiser, blocks: Sequence[int], block_size: int) -> "Running":
        """Return a request whose canvas lies in ``blocks``, one after the other."""
        at = np.arange(len(denoiser.canvas))
        table = np.asarray(blocks, dtype=np.int64)
        return cls(denoiser, table, table[at // block_size] * block_size + at % block_size)


class RunningRequests:
    """All requests of a worker, by id."""

    def __init__(
        self,
        settings: DiffusionSettings,
        *,
        mask: int,
        layers: int,
        block_size: int,
        max_model_len: int,
        seed: int,
    ) -> None:
        """Start without a request.

        Args:
            settings: How the server is configured.
            mask: The mask token.
            layers: Number of layers of the model.
            block_size: Tokens of a cache block.
            max_model_len: The most positions of a request.
            seed: Seed of requests that sample and bring no seed of their own.
        """
        self._settings, self._mask, self._layers = settings, mask, layers
        self._block_size, self._max_model_len = block_size, max_model_len
        self._seeds = np.random.default_rng(seed)
        self._requests: dict[str, Running] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, name: str) -> Running:
        return self._requests[name]

    def update(self, scheduled: SchedulerOutput) -> None:
        """Drop requests that ended, admit new ones, and resume those that lost their blocks."""
        for name in scheduled.finished_req_ids:
            self._requests.pop(name, None)
        for request in scheduled.scheduled_new_reqs:
            if request.req_id in self._requests:  # for Model Runner V2, a resumed request is new
                self._resume(request.req_id, request.block_ids[0])
            else:
                self._requests[request.req_id] = self._admitted(request)
        cached = scheduled.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self._resume(name, blocks[0])

    def _resume(self, name: str, blocks: Sequence[int]) -> None:
        """Continue a request in new blocks.

        Only ``reset_prefix_cache(reset_running_requests=True)`` takes blocks away. Committed tokens
        stay, as generated tokens do in other models.
        """
        denoiser = self._requests[name].denoiser
        denoiser.restart()
        self._requests[name] = Running.of(denoiser, blocks, self._block_size)

    def _admitted(self, request: NewRequestData) -> Running:
        params, prompt = request.sampling_params, request.prompt_token_ids
        decoding, policy = decoding_of(params, self._settings)
        stops = set(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stops.add(params.eos_token_id)
        denoiser = Denoiser(
            prompt,
            canvas_length(len(prompt), params, self._max_model_len),
            decoding,
            policy,
            mask=self._mask,
            layers=self._layers,
            stops=stops,
            fill=params.eos_token_id,
            temperature=params.temperature,
            seed=int(self._seeds.integers(2**63)) if params.seed is None else params.seed,
        )
        return Running.of(denoiser, request.block_ids[0], self._block_size)
