# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for, in ``extra_args``, or in ``vllm_xargs`` over HTTP.

``compress_keep``: 1 keeps its whole KV cache; a smaller share is at most what is served.
``compress_budget``: tokens that stay of it, at most what is served.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllm import SamplingParams

from compress_common.errors import CompressError
from kv_policies.budget.share import exact
from kv_policies.layout.base import Amount
from vllm_plugin.request_check import RequestCheck, misspelt

KEEP, BUDGET = "compress_keep", "compress_budget"
_LONGEST = 24  # characters of a number
_LEAST_SHARE = 1e-9  # and the finest step of shares


@dataclass(frozen=True)
class Served:
    """What the engine of this process serves, and so what a request may ask for less than.

    Attributes:
        keep: Share of every layer; None: none that a request could lower.
        budget: Tokens of every layer; None: none that a request could lower.
        least_budget: Two decode windows.
        whole: A request may keep its whole cache. Not with prompt windows: a prompt that is larger
            than the pool would wait forever.
    """

    keep: Fraction | None = None
    budget: int | None = None
    least_budget: int = 0
    whole: bool = True


# Set where an engine is configured, in each process that takes requests. Until then a request may
# only opt out.
served = Served()


def _nobody(reason: str) -> None:
    pass


# Called with the reason of each refusal, in the process that refuses. The reasons are those of
# ``metrics.catalogue.REFUSALS``.
on_refusal: Callable[[str], None] = _nobody


def opts_out(params: SamplingParams | None) -> bool:
    """Tell whether a validated request keeps its whole KV cache."""
    value = _extra(params).get(KEEP)
    return value is not None and _share(value) == 1


def asked(params: SamplingParams | None) -> Amount | None:
    """What a validated request asked for; None: what is served, or all."""
    extra = _extra(params)
    if (budget := extra.get(BUDGET)) is not None:
        return _tokens(budget)
    value = extra.get(KEEP)
    return None if value is None or (share := _share(value)) == 1 else share


def check(params: SamplingParams, cached: bool) -> None:
    """Refuse a request that asks for what it cannot have.

    A request with a budget of its own is kept from reading the prefix cache: a hit could reach
    blocks that it overwrites, which another budget leaves alone.

    Args:
        params: The request's parameters; only ``extra_args`` is read.
        cached: Whether prefix caching is on.

    Raises:
        ValueError: HTTP 400 over the endpoint. The text says what a request may set.
    """
    extra = _extra(params)
    if unknown := misspelt(extra, (KEEP, BUDGET)):
        on_refusal("unknown_key")
        raise CompressError(f"{'; '.join(unknown)} (a request may set {KEEP} or {BUDGET})")
    keep, budget = extra.get(KEEP), extra.get(BUDGET)
    name = KEEP if budget is None else BUDGET
    if (keep is not None or budget is not None) and not cached:
        on_refusal("prefix_caching_off")
        raise ValueError(
            f"{name} needs prefix caching: without it the scheduler's cache managers see no "
            "requests. Serve with --enable-prefix-caching, or leave it out"
        )
    problem, advice = None, "leave it out"
    if keep is not None and budget is not None:
        problem, advice = f"{KEEP} and {BUDGET} exclude each other", "set one of them, or neither"
    elif keep is not None and not _may_keep(keep):
        problem = f"{KEEP} of a request {_shares()}, got {keep!r}"
    elif budget is not None and not _may_have(budget):
        problem = f"{BUDGET} of a request {_budgets()}, got {budget!r}"
    if problem is not None:
        on_refusal(name)
        raise ValueError(f"{problem}; {advice} for what the server was started with")
    if budget is not None:
        params.skip_reading_prefix_cache = True


def _may_keep(value: Any) -> bool:
    share = _share(value)
    if share is None or share == 1:
        return share == 1 and served.whole
    return served.keep is not None and share <= served.keep


def _may_have(value: Any) -> bool:
    tokens = _tokens(value)
    return (
        tokens is not None
        and served.budget is not None
        and served.least_budget <= tokens <= served.budget
    )


def _shares() -> str:
    """The shares that a request may ask for."""
    if not served.whole:
        return "has no use beside prompt windows: its whole KV cache may not fit"
    if served.keep is None:
        return "can only be 1, which keeps its whole KV cache"
    return f"can only be 1, which keeps its whole KV cache, or a share up to {float(served.keep)}"


def _budgets() -> str:
    """The budgets that a request may ask for."""
    if served.budget is None:
        return "needs a server with compress.kv.budget and without a profile"
    least = f"{served.least_budget} tokens, two windows of compress.kv.decode_window"
    return f"can only be from {least}, to {served.budget} tokens"


def _share(value: Any) -> Fraction | None:
    """A share as typed, of at most nine decimals; None: it is none."""
    typed = str(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(typed) > _LONGEST:
        return None
    try:
        # A fraction of an exponent such as e-999999999 would take all memory.
        share = exact(typed) if _LEAST_SHARE <= float(typed) <= 1 else None
    except (ValueError, CompressError):
        return None
    return share if share is not None and share.denominator <= 1 / _LEAST_SHARE else None


def _tokens(value: Any) -> int | None:
    """A number of tokens as typed; None: it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _LONGEST:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _extra(params: SamplingParams | None) -> dict[str, Any]:
    return (params and params.extra_args) or {}


class KVRequestCheck(RequestCheck):
    """Calls ``check`` for each request when it arrives."""

    cached = True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check(sampling_params, cls.cached)


class UncachedKVRequestCheck(KVRequestCheck):
    """The check where prefix caching is off."""

    cached = False
