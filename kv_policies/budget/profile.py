# SPDX-License-Identifier: Apache-2.0
"""The profile: the share of the KV cache that each layer of a model keeps, in a small JSON file."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from compress_common.errors import CompressError, joined
from kv_policies.budget.levels import Levels, quantize
from kv_policies.budget.share import exact
from kv_policies.model_file import Calibration, ModelFile, ModelFingerprint

SCHEMA: Final = "vllm-compress/kv-profile"
VERSION: Final = 2

# In JSON "137/1000": exact and readable. Numbers are accepted too.
Share = Annotated[
    Fraction, BeforeValidator(exact), PlainSerializer(str, return_type=str, when_used="json")
]


class Provenance(Calibration):
    """Where the shares come from."""

    attention_retained: Mapping[str, float] = Field(
        default_factory=dict,
        description="share of attention kept: 'profile', 'levels' (after their cut), 'uniform'",
    )


class Profile(ModelFile):
    """The share of its tokens that each layer of one model keeps, for one budget.

    It serves the weights that it was measured on, and no fine-tune of them.

    Attributes:
        keep: Mean of ``fractions``, exactly.
        levels: Number of different shares that the engine serves.
        layers: Index in the model of each compressed layer, ascending. Layers that are left alone,
            such as those with a sliding window, are not in it.
        fractions: Share of each of ``layers``, before it is cut into levels.
    """

    noun: ClassVar[str] = "profile"
    command: ClassVar[str] = "profile {} --keep KEEP"

    schema_name: Literal["vllm-compress/kv-profile"] = Field(SCHEMA, alias="schema")
    version: Literal[2] = VERSION
    keep: Share
    levels: int = Field(ge=1, le=8)
    layers: tuple[int, ...]
    fractions: tuple[Share, ...]
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> "Profile":
        problems = []
        if len(self.layers) != len(self.fractions):
            problems.append(f"{len(self.layers)} layers but {len(self.fractions)} fractions")
        if not self.layers:
            problems.append("no layers")
        if list(self.layers) != sorted(set(self.layers)):
            problems.append("layers are not ascending")
        depth = self.model.num_hidden_layers
        if any(not 0 <= layer < depth for layer in self.layers):
            problems.append(f"layers outside 0 to {depth - 1}, the model's depth")
        if self.fractions:
            mean = sum(self.fractions, Fraction(0)) / len(self.fractions)
            if mean != self.keep:
                problems.append(
                    f"the mean of the fractions is {mean}, keep is {self.keep}; they must be equal"
                )
            try:
                quantize(self.fractions, self.levels)
            except CompressError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers that the profile covers."""
        return self.layers

    def cut(self, levels: int | None = None) -> Levels:
        """Return the fractions cut into levels, in the order of ``layers``.

        Args:
            levels: How many; None: as many as the profile says.
        """
        return quantize(self.fractions, levels or self.levels)

    def save(self, path: str | Path) -> None:
        """Write the profile. The same profile is the same bytes."""
        Path(path).write_text(self.text(indent=2) + "\n", encoding="utf-8")


def load(
    path: str | Path, model: ModelFingerprint | None = None, layers: Sequence[int] | None = None
) -> Profile:
    """Read and check a profile.

    Args:
        path: The JSON file.
        model: The model to be served; None: the profile is not compared with one.
        layers: The model's layers that the engine can compress; None: all.

    Raises:
        CompressError: Everything that is wrong with the file.
    """
    remedy = Profile.remedy(model)
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"cannot read the profile {path}: {error.strerror or error}; {remedy}"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise CompressError(f"the profile {path} is not JSON ({error}); {remedy}") from error
    profile, told = Profile.parse(content, path, model)
    problems = []
    if told not in (None, profile.digest()):
        problems.append(
            "was changed after it was written (its sha256 is another); to serve it as edited, set "
            '"sha256" to null'
        )
    if model is not None:
        problems += profile.mismatches(model, layers)
    if problems:
        raise joined([f"the profile {path} {problem}; or {remedy}" for problem in problems])
    return profile
