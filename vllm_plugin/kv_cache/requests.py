# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: ``extra_args={"compress_keep": 1}``, ``vllm_xargs`` over HTTP."""

from collections.abc import Callable

from vllm import SamplingParams

from compress_common.errors import CompressError
from vllm_plugin.request_check import RequestCheck, misspelt

KEY = "compress_keep"


def _nobody(reason: str) -> None:
    pass


# Called with the reason of each refusal, in the process that refuses. The reasons are those of
# ``metrics.catalogue.REFUSALS``.
on_refusal: Callable[[str], None] = _nobody


def opts_out(params: SamplingParams | None) -> bool:
    """Tell whether a validated request keeps its whole KV cache."""
    return bool(params and params.extra_args and params.extra_args.get(KEY) is not None)


def check(params: SamplingParams, cached: bool) -> None:
    """Refuse a request that asks for what it cannot have.

    Args:
        params: The request's parameters; only ``extra_args`` is read.
        cached: Whether prefix caching is on.

    Raises:
        ValueError: HTTP 400 over the endpoint. The text says what a request may set.
    """
    extra = params.extra_args or {}
    if unknown := misspelt(extra, (KEY,)):
        on_refusal("unknown_key")
        raise CompressError(f"{'; '.join(unknown)} (a request may set {KEY})")
    value = extra.get(KEY)
    if value is not None and not cached:
        on_refusal("prefix_caching_off")
        raise ValueError(
            f"{KEY} needs prefix caching: without it the scheduler's cache managers see no "
            "requests. Serve with --enable-prefix-caching, or leave it out"
        )
    # Other shares would need other groups of layers; all requests share the blocks of a group.
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
