# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: ``extra_args={"compress_keep": 1}``, ``vllm_xargs`` over HTTP."""

from collections.abc import Callable

from vllm import SamplingParams

from vllm_plugin.request_check import RequestCheck

KEY = "compress_keep"


def _nobody(reason: str) -> None:
    pass


# Told the reason of each refusal, in the process that refuses: "compress_keep" for a share that a
# request cannot have, "prefix_caching_off".
on_refusal: Callable[[str], None] = _nobody


def opts_out(params: SamplingParams | None) -> bool:
    """Whether a (validated) request keeps its whole KV cache."""
    return bool(params and params.extra_args and params.extra_args.get(KEY) is not None)


def check(params: SamplingParams, cached: bool) -> None:
    """ValueError, HTTP 400 over the endpoint, when a request asks for what it cannot have.

    cached: whether prefix caching is on.
    """
    value = (params.extra_args or {}).get(KEY)
    if value is not None and not cached:
        on_refusal("prefix_caching_off")
        raise ValueError(
            f"{KEY} needs prefix caching: without it the scheduler's cache managers see no "
            "requests. Serve with --enable-prefix-caching, or leave it out"
        )
    # Other shares would need other groups of layers; blocks of one group are shared by all.
    if value is not None and (isinstance(value, bool) or value not in (1, "1", "1.0")):
        on_refusal("compress_keep")
        raise ValueError(
            f"{KEY} of a request can only be 1, which keeps its whole KV cache, got {value!r}; "
            "leave it out for the share that the server was started with"
        )


class KVRequestCheck(RequestCheck):
    """Calls ``check`` for each request when it arrives."""

    cached = True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check(sampling_params, cls.cached)


class UncachedKVRequestCheck(KVRequestCheck):
    """The check where prefix caching is off."""

    cached = False
