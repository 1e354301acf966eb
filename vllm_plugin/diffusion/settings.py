# SPDX-License-Identifier: Apache-2.0
"""``compress.diffusion``: how a diffusion model is served, and what a request can change."""

from collections.abc import Callable
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from compress_common.errors import CompressError, explain, joined
from dllm_denoising.base import CachePolicy
from dllm_denoising.registry import POLICIES, build_policy, policies
from dllm_denoising.settings import PAIRS, Decoding

DEFAULT_POLICY = "fixed_period"
BLOCK = 32  # tokens of a block, where a policy needs blocks and no length is set


class DiffusionSettings(Decoding):
    """Commit rule, schedule, ``policy``, and the settings of that policy, such as gamma."""

    model_config = ConfigDict(extra="allow", frozen=True)

    policy: str = Field(
        DEFAULT_POLICY, description="when the cache is recomputed: see `vllm-compress methods`"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, values: Any, section: Callable[[Any], Self]) -> Self:
        name = str(values.get("policy", DEFAULT_POLICY)) if isinstance(values, dict) else ""
        return POLICIES.validate(values, section, cls.model_fields, name)

    @model_validator(mode="after")
    def _fits_the_policy(self) -> "DiffusionSettings":
        kind = policies().get(self.policy)
        if kind is not None and kind.blocks_only and self.window_length is not None:
            raise ValueError(
                f"`window_length`: {self.policy} works on blocks; give `block_length` instead"
            )
        return self

    def build(self) -> CachePolicy:
        """Return a policy for one request.

        Raises:
            CompressError: With all problems of its settings.
        """
        return build_policy(self.policy, dict(self.model_extra or {}))

    def decoding(self) -> Decoding:
        """Return commit rule and schedule."""
        chosen = self.model_dump(include=set(Decoding.model_fields), exclude_none=True)
        if self.block_length is None and policies()[self.policy].blocks_only:
            chosen["block_length"] = BLOCK
        return Decoding(**chosen)

    def for_request(self, values: dict[str, Any]) -> "DiffusionSettings":
        """Return these settings with the values of a request.

        Raises:
            CompressError: With all problems of the values.
        """
        mine = self.model_dump(exclude_none=True)
        for one, other in PAIRS:
            if one in values:
                mine.pop(other, None)
            if other in values:
                mine.pop(one, None)
        if "policy" in values:
            raise CompressError(
                "a request cannot choose the policy, only settings of the served one, "
                f"{self.policy}"
            )
        try:
            changed = DiffusionSettings(**(mine | values))
        except ValidationError as error:
            raise joined(explain(error, "request", list(Decoding.model_fields))) from error
        changed.build()
        return changed
