# SPDX-License-Identifier: Apache-2.0
"""Settings of decoding. A server sets them, and a request can change them."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dllm_denoising.commit import CommitRule, Fixed, Threshold
from dllm_denoising.schedule import Blocks, Schedule, Window

THRESHOLD, WINDOW = 0.9, 16
# At most one of each pair can be set.
PAIRS = (("threshold", "tokens_per_step"), ("window_length", "block_length"))


class Decoding(BaseModel):
    """Commit rule and schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="commit tokens of at least this probability; lower: fewer steps, more "
        f"mistakes ({THRESHOLD} without tokens_per_step)",
    )
    tokens_per_step: int | None = Field(
        None, ge=1, le=1024, description="commit this many tokens in each step instead"
    )
    window_length: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="predict this many of the leftmost masked positions; fewer: less work per step "
        f"({WINDOW} without block_length)",
    )
    block_length: int | None = Field(
        None, ge=1, le=4096, description="predict one block of this length after the other instead"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> "Decoding":
        for one, other in PAIRS:
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"`{one}` and `{other}` exclude each other; give one of them")
        return self

    def rule(self) -> CommitRule:
        """Return the commit rule, with the default where none is set."""
        if self.tokens_per_step is not None:
            return Fixed(self.tokens_per_step)
        return Threshold(THRESHOLD if self.threshold is None else self.threshold)

    def schedule(self) -> Schedule:
        """Return the schedule, with the default where none is set."""
        if self.block_length is not None:
            return Blocks(self.block_length)
        return Window(WINDOW if self.window_length is None else self.window_length)
