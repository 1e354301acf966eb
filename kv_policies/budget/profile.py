# SPDX-License-Identifier: Apache-2.0
"""The profile: per-layer fractions of one model in a small versioned JSON file."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from compress_common.errors import CompressError, explain, joined
from kv_policies.budget.levels import Levels, exact, quantise

SCHEMA: Final = "vllm-compress/kv-profile"
VERSION: Final = 1

# In JSON "137/1000": exact, and readable. Numbers are accepted, as they are typed.
Share = Annotated[
    Fraction, BeforeValidator(exact), PlainSerializer(str, return_type=str, when_used="json")
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelFingerprint(_Strict):
    """What makes two models the same to a profile: their shape, and the attention they were
    trained to. Weights of a fine-tune may differ; ``name`` is for people and is not compared.
    """

    name: str
    architecture: str = Field(description="class name, such as LlamaForCausalLM")
    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)

    def differences(self, other: "ModelFingerprint") -> list[str]:
        """One line per field in which ``other`` is another model."""
        return [
            f"{field} is {getattr(self, field)!r} in the file, {getattr(other, field)!r} in the "
            "model"
            for field in type(self).model_fields
            if field != "name" and getattr(self, field) != getattr(other, field)
        ]


class Provenance(_Strict):
    """Where the figures come from."""

    tool_version: str
    created: str = Field(description="date and time, ISO 8601")
    text: str = Field(description="name or path of the calibration text")
    text_sha256: str | None = None
    samples: int = Field(ge=1)
    sample_tokens: int = Field(ge=1, description="tokens of the longest sample")
    attention_retained: Mapping[str, float] = Field(
        default_factory=dict,
        description="share of attention kept: 'profile', 'levels' (after their cut), 'uniform'",
    )


class Profile(_Strict):
    """Per-layer keep fractions of one model for one budget.

    fractions: the share each compressed layer keeps, before it is cut into levels; their mean is
        ``keep``, exactly.
    layers: index in the model of each compressed layer, ascending. Sliding-window layers and
        others that are left alone are not in it.
    levels: number of levels that the engine cuts the fractions into.
    """

    schema_name: Literal["vllm-compress/kv-profile"] = Field(SCHEMA, alias="schema")
    version: Literal[1] = VERSION
    model: ModelFingerprint
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
                problems.append(f"the mean of the fractions is {mean}, keep is {self.keep}")
            try:
                quantise(self.fractions, self.levels)
            except CompressError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def cut(self, levels: int | None = None) -> Levels:
        """The fractions cut into levels, in the order of ``layers``: the profile's own number,
        or another."""
        return quantise(self.fractions, levels or self.levels)

    def mismatches(self, model: ModelFingerprint, layers: Sequence[int]) -> list[str]:
        """Why the profile cannot serve this model, whose compressible layers are ``layers``."""
        problems = self.model.differences(model)
        if not problems and tuple(layers) != self.layers:
            problems.append(
                f"compresses layers {_ranges(self.layers)}, the engine can compress "
                f"{_ranges(layers)}"
            )
        return problems

    def save(self, path: str | Path) -> None:
        """Write the profile; the same profile is the same bytes."""
        text = self.model_dump_json(by_alias=True, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")


def load(
    path: str | Path, model: ModelFingerprint | None = None, layers: Sequence[int] | None = None
) -> Profile:
    """Read and check a profile; with ``model``, also that it was made for it.

    layers: the model's layers that the engine can compress; None: all of them. CompressError lists
    everything that is wrong.
    """
    again = f"make one with `vllm-compress profile {model.name if model else 'MODEL'} --keep KEEP`"
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"cannot read the profile {path}: {error.strerror or error}; {again}"
        ) from error
    except ValueError as error:  # of JSON, or of the encoding
        raise CompressError(f"the profile {path} is not JSON ({error}); {again}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CompressError(f"{path} is not a KV profile (schema {SCHEMA!r}); {again}")
    if content.get("version") != VERSION:
        raise CompressError(
            f"the profile {path} has version {content.get('version')!r}, this plugin reads version "
            f"{VERSION}; {again}"
        )
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        names = [field.alias or name for name, field in Profile.model_fields.items()]
        raise joined(explain(error, str(path), names)) from error
    if model is not None:
        depth = range(model.num_hidden_layers)
        problems = profile.mismatches(model, depth if layers is None else layers)
        if problems:
            where = f"the profile {path} is of {profile.model.name}, not of {model.name}"
            raise joined([f"{where}: {problem}; {again}" for problem in problems])
    return profile


def _ranges(layers: Sequence[int]) -> str:
    """``0-4, 6``: short for a list of layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
