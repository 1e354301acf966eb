# SPDX-License-Identifier: Apache-2.0
"""What one request can set, as ``vllm_xargs`` such as ``compress_threshold`` over HTTP.

Parameters that denoising does not support (log-probabilities, grammars, penalties) are refused.
They are never ignored.
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

# Carries the server's settings to the API processes, which validate requests.
_VARIABLE = "COMPRESS_DIFFUSION_SETTINGS"

# Parameters that denoising does not support, and the values that have no effect.
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
# These filter sampled tokens, so that no value has an effect at temperature 0.
_SAMPLING: dict[str, tuple[Any, ...]] = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
# Those of both that a generation_config.json can set as a default for all requests.
UNSUPPORTED = _SAMPLING | {
    name: _REFUSED[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
}


def canvas_length(prompt: int, params: SamplingParams, max_model_len: int) -> int:
    """Return how many masks follow a prompt of so many tokens.

    Prompt and canvas together have at most ``max_model_len`` positions, as in any vLLM engine.
    """
    return min(params.max_tokens or max_model_len, max_model_len - prompt)


def decoding_of(params: SamplingParams, served: DiffusionSettings) -> tuple[Decoding, CachePolicy]:
    """Return decoding and policy of a validated request."""
    mine = served.for_request(_asked(params))
    return mine.decoding(), mine.build()


def check(params: SamplingParams, served: DiffusionSettings) -> None:
    """Refuse a request that asks for what is not supported.

    Raises:
        ValueError: With all problems. The endpoint answers with HTTP 400.
    """
    problems = []
    unfit = dict(_REFUSED)
    if params.temperature > 0:
        unfit |= _SAMPLING
    for name, nothing in unfit.items():
        value = getattr(params, name, nothing[0])
        if value not in nothing:
            problems.append(
                f"{name} {value!r} is not supported by a diffusion model"
                f"{' above temperature 0' if name in _SAMPLING else ''}, which commits several "
                "tokens at a time in any order; leave it out"
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

    vLLM does not pass the config to this class, so the settings are in the environment.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check(sampling_params, DiffusionSettings(**json.loads(os.environ[_VARIABLE])))


def check_requests(config: VllmConfig, served: DiffusionSettings) -> None:
    """Register the check of requests with an engine's config."""
    os.environ[_VARIABLE] = json.dumps(served.model_dump(exclude_none=True))
    model = config.model_config
    model.logits_processors = [*(model.logits_processors or []), DiffusionRequestCheck]
