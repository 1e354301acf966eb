# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: ``vllm_xargs`` such as ``compress_threshold`` over HTTP.

What a denoiser cannot give (log-probabilities, grammars, penalties) is refused, not left out.
"""

import json
import os
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig

from compress_common.errors import joined
from dllm_denoising.base import CachePolicy
from dllm_denoising.settings import Decoding
from vllm_plugin.diffusion.settings import DiffusionSettings
from vllm_plugin.kv_cache import requests as kv_requests
from vllm_plugin.request_check import PREFIX, RequestCheck, misspelt

# Carries the server's settings to each of its API processes, which validate requests.
_VARIABLE = "COMPRESS_DIFFUSION_SETTINGS"

# Parameters that have no meaning for a denoiser, and the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "structured_outputs": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repetition_detection": (None,),
    "thinking_token_budget": (None,),
}
# These choose among sampled tokens, so they ask for nothing at temperature 0.
_SAMPLING: dict[str, tuple[Any, ...]] = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
# Of both, what a generation_config.json may set as a default for all requests.
UNSUPPORTED = _SAMPLING | {
    name: _REFUSED[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
}


def canvas_length(prompt: int, params: SamplingParams, max_model_len: int) -> int:
    """Masks behind a prompt of so many tokens."""
    return min(params.max_tokens or max_model_len, max_model_len - prompt)


def decoding_of(params: SamplingParams, served: DiffusionSettings) -> tuple[Decoding, CachePolicy]:
    """What a (validated) request is decoded with."""
    mine = served.for_request(_asked(params))
    return mine.decoding(), mine.build()


def check(params: SamplingParams, served: DiffusionSettings) -> None:
    """ValueError, HTTP 400 over the endpoint, with all that a request cannot have."""
    problems = []
    unfit = dict(_REFUSED)
    if params.temperature > 0:
        unfit |= _SAMPLING
    for name, nothing in unfit.items():
        value = getattr(params, name, nothing[0])
        if value not in nothing:
            problems.append(
                f"{name} {value!r}: a diffusion model commits tokens in any order, several at a "
                f"time, and has no such thing{' above temperature 0' if name in _SAMPLING else ''};"
                " leave it out"
            )
    settings = (*Decoding.model_fields, *type(served.build()).settings_type.model_fields)
    allowed = [PREFIX + name for name in settings]
    unknown = misspelt(params.extra_args or {}, [*allowed, PREFIX + "policy"])
    try:
        if not unknown:
            served.for_request(_asked(params))
    except ValueError as error:
        unknown.append(str(error))
    if unknown:
        problems.append(f"{'; '.join(unknown)} (a request may set {', '.join(allowed)})")
    if problems:
        kv_requests.on_refusal("diffusion")
        raise joined(problems)


def _asked(params: SamplingParams) -> dict[str, Any]:
    extra = params.extra_args or {}
    return {
        name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)
    }


class DiffusionRequestCheck(RequestCheck):
    """Calls ``check`` for each request when it arrives.

    vLLM does not tell it the configuration there, so that travels in the environment.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check(sampling_params, DiffusionSettings(**json.loads(os.environ[_VARIABLE])))


def check_requests(config: VllmConfig, served: DiffusionSettings) -> None:
    """Have requests of this engine checked."""
    os.environ[_VARIABLE] = json.dumps(served.model_dump(exclude_none=True))
    model = config.model_config
    model.logits_processors = [*(model.logits_processors or []), DiffusionRequestCheck]
