# SPDX-License-Identifier: Apache-2.0
"""What a profile and a file of bases share: the model they are made for, and a digest."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress_common.consecutive import consecutive
from compress_common.errors import CompressError, explain, joined
from compress_common.store import digest


class Strict(BaseModel):
    """A part of a file: no unknown keys, no change after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelFingerprint(Strict):
    """What must agree for two models to share a file: architecture, shape and weights.

    ``name`` is for people and is not compared. ``weights`` is compared where both have it.
    """

    name: str
    architecture: str = Field(description="class name, such as LlamaForCausalLM")
    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    weights: str | None = Field(None, description="SHA-256 of every tensor of the checkpoint")

    def differences(self, other: "ModelFingerprint") -> list[str]:
        """Return one line for each field in which the model ``other`` differs from the file's."""
        lines = [
            f"{field} is {getattr(self, field)!r} in the file, {getattr(other, field)!r} in the "
            "model"
            for field in type(self).model_fields
            if field not in ("name", "weights") and getattr(self, field) != getattr(other, field)
        ]
        if not lines and self.weights and other.weights and self.weights != other.weights:
            lines.append("the weights differ: it is another fine-tune or revision")
        return lines


class Calibration(Strict):
    """Where the figures of a file come from."""

    tool_version: str
    created: str = Field(description="date and time, ISO 8601")
    text: str = Field(description="name of the calibration text")
    text_sha256: str | None = None
    samples: int = Field(ge=1, description="texts that the figures come from")
    sample_tokens: int = Field(ge=1, description="tokens of the longest sample")


class ModelFile(Strict):
    """The header of a file that was measured for one model.

    Subclasses narrow ``schema_name`` and ``version`` to literals with defaults.

    Attributes:
        noun: What the file is called in messages.
        command: What makes one, after ``vllm-compress``; ``{}`` stands for the model.
    """

    noun: ClassVar[str]
    command: ClassVar[str]

    schema_name: str = Field(alias="schema")
    version: int
    model: ModelFingerprint

    @property
    def indices(self) -> tuple[int, ...]:
        """Index in the model of each layer that the file covers, ascending."""
        raise NotImplementedError

    @classmethod
    def remedy(cls, model: ModelFingerprint | None) -> str:
        """Say how to make such a file, for the end of a message."""
        return (
            f"make it with `vllm-compress {cls.command.format(model.name if model else 'MODEL')}`"
        )

    @classmethod
    def parse(
        cls, content: Any, path: str | Path, model: ModelFingerprint | None
    ) -> tuple[Self, Any]:
        """Return the header that parsed JSON holds, and the digest in it, which is not checked.

        Args:
            content: What the file says of itself; anything that JSON can be.
            path: The file, for messages.
            model: The model to be served, for messages.

        Raises:
            CompressError: Not such a file, or another version; or all fields that are wrong.
        """
        remedy, fields = cls.remedy(model), cls.model_fields
        schema, version = fields["schema_name"].default, fields["version"].default
        if not isinstance(content, dict) or content.get("schema") != schema:
            raise CompressError(f"{path} is not a KV {cls.noun} file (schema {schema!r}); {remedy}")
        if content.get("version") != version:
            raise CompressError(
                f"the {cls.noun} file {path} has version {content.get('version')!r}, this plugin "
                f"reads version {version}; {remedy}"
            )
        try:
            header = cls.model_validate({k: v for k, v in content.items() if k != "sha256"})
        except ValidationError as error:
            names = [field.alias or name for name, field in fields.items()]
            raise joined([f"{p}; {remedy}" for p in explain(error, str(path), names)]) from error
        return header, content.get("sha256", "none")

    def digest(self, tensors: Iterable[bytes | memoryview] = ()) -> str:
        """Return the SHA-256 of the header and of the tensors in its file."""
        content = self.model_dump(mode="json", by_alias=True)
        return digest(json.dumps(content, sort_keys=True), *tensors)

    def text(self, tensors: Iterable[bytes | memoryview] = (), indent: int | None = None) -> str:
        """Return the JSON for a file, with the digest."""
        content = self.model_dump(mode="json", by_alias=True)
        return json.dumps(content | {"sha256": self.digest(tensors)}, indent=indent)

    def mismatches(self, model: ModelFingerprint, layers: Sequence[int] | None) -> list[str]:
        """Return why the file cannot serve a model.

        Args:
            model: The model to be served.
            layers: Its layers that the engine can compress; None: all.
        """
        made = f"is made for {self.model.name}, not for {model.name}"
        if problems := self.model.differences(model):
            return [f"{made}: {problem}" for problem in problems]
        wanted = range(model.num_hidden_layers) if layers is None else layers
        if tuple(wanted) != self.indices:
            return [f"has layers {ranges(self.indices)}, the engine compresses {ranges(wanted)}"]
        return []


def ranges(layers: Sequence[int]) -> str:
    """Return a short text for a list of layers: ``0-4, 6``."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in consecutive(layers)) or "none"
