# SPDX-License-Identifier: Apache-2.0
"""The ``compress`` section of ``--additional-config``, validated here and only here."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError, explain, joined
from dllm_denoising.registry import policies as diffusion_policies
from kv_policies.base import Capabilities, Policy
from kv_policies.budget.profile import Share
from kv_policies.registry import KV_POLICIES, build_policy, policies
from quant_methods.plan_request import PlanRequest
from quant_methods.registry import methods, served_methods
from vllm_plugin import KEY
from vllm_plugin.diffusion.settings import DiffusionSettings


class WeightSettings(BaseModel):
    """``compress.weights``: these keys, plus those of the method that ``--quantization`` names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    activations: Literal["auto", "bf16", "int8"] = Field(
        "auto",
        description="CPU only. bf16: only the weights are 4-bit. int8: activations are rounded to "
        "8 bits per token as well (AMX). auto: int8 where vLLM's int4 kernel does so, else bf16",
    )
    calibration: CalibrationSettings = Field(
        CalibrationSettings(), description="the text that methods are calibrated on"
    )

    def request(self, method: str, tensor_parallel: int) -> PlanRequest:
        """Build the request to quant_methods; CompressError where a setting is not valid."""
        settings = dict(self.model_extra or {})
        if "tensor_parallel" in settings:
            raise CompressError(
                f"{KEY}.weights.tensor_parallel is taken from --tensor-parallel-size; remove it"
            )
        request = PlanRequest(
            method=method,
            settings=settings | {"tensor_parallel": tensor_parallel},
            calibration=self.calibration,
        )
        request.build()
        return request

    def fixed_problems(self) -> list[str]:
        """Refuse settings that an int4 checkpoint has from when it was written."""
        if fixed := sorted(self.model_fields_set - {"activations"}):
            problem = (
                f"{KEY}.weights.{', '.join(fixed)}: the checkpoint is quantized already, and these "
                "settings were fixed when it was written; remove them"
            )
            return [problem]
        return []


def no_method_problem(quantization: str | None) -> CompressError:
    """Return the error of ``compress.weights`` without a weight method that it could apply to.

    Args:
        quantization: the method in effect, which is none of this plugin's.
    """
    return CompressError(
        f"{KEY}.weights is set, but no weight method of this plugin is chosen (--quantization is "
        f"{quantization}); add --quantization smoothquant_plus or remove the section"
    )


class KVSettings(BaseModel):
    """``compress.kv``: these keys, plus those of the policy, such as ``queries`` of prefix_kv."""

    model_config = ConfigDict(extra="allow", frozen=True)

    policy: str = Field(description="what is scored: see `vllm-compress methods`")
    keep: Share | None = Field(
        None,
        description="share of the KV cache that is kept, in (0, 1]; smaller: more requests fit, "
        "more is forgotten. Can be left out with a profile, which has its own",
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="in place of keep: tokens that stay per request, prompt and generated ones "
        "together, however many there are; rounded up to whole blocks. Smaller: less memory, more "
        "is forgotten",
    )
    prompt_window: int | None = Field(
        None,
        ge=1,
        description="beside budget: longer prompts are compacted while they are computed, from "
        "this many tokens on, rounded up to whole blocks. A prompt can then be larger than the "
        "cache, and its later tokens see what is left of the earlier ones. Smaller: less memory, "
        "more is lost. Default: prompts are computed whole",
    )
    profile: Path | None = Field(
        None,
        description="file of per-layer shares, made by `vllm-compress profile`; none: every layer "
        "keeps the same share",
    )
    levels: int | None = Field(
        None, ge=1, le=8, description="groups that a profile's layers are cut into; its own if none"
    )
    decode_window: int | None = Field(
        None,
        ge=0,
        description="generated tokens are compacted in windows of this many, a multiple of the "
        "block size; smaller: memory is given back earlier, but fewer tokens compete; 0: never. "
        "Default: 256, rounded up to whole blocks; for cskv the fewest that can become latents",
    )
    min_prompt: int = Field(
        128, ge=0, description="shorter prompts keep everything; tokens, rounded up to whole blocks"
    )
    min_blocks: int = Field(
        1, ge=1, description="least number of blocks that a compacted prompt or window keeps"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, values: Any, section: Callable[[Any], Self]) -> Self:
        """Refuse unknown keys here, where those of the section and of the policy are both known."""
        name = str(values.get("policy")) if isinstance(values, dict) else ""
        return KV_POLICIES.validate(values, section, cls.model_fields, name)

    @model_validator(mode="after")
    def _has_a_budget(self) -> "KVSettings":
        problems = []
        given = {self.keep, self.budget, self.profile, self.bases} - {None}
        if not given and self.latents:
            problems.append(
                "needs `bases`, the file that `vllm-compress calibrate-kv MODEL` writes"
            )
        elif not given:
            problems.append(
                "needs `keep`, the share that stays, or `budget`, the tokens that stay, or a "
                "`profile`"
            )
        if self.levels is not None and self.profile is None:
            problems.append("`levels` cuts a profile's layers; add `profile` or remove it")
        if self.latents:
            problems += self._beside_latents()
        if self.budget is not None:
            problems += self._beside_a_budget()
        elif self.prompt_window is not None:
            problems.append("`prompt_window` needs `budget`, which bounds what stays; add it")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _beside_a_budget(self) -> list[str]:
        """What contradicts ``budget``."""
        problems = [
            f"`{name}` has no use beside `budget`; remove it"
            for name in ("keep", "min_prompt", "min_blocks")
            if name in self.model_fields_set
        ]
        if self.latents:
            problems.append(f"{self.policy} keeps every token; remove `budget`")
        if self.decode_window == 0:
            problems.append("`budget` bounds generated tokens too; remove `decode_window: 0`")
        return problems

    def _beside_latents(self) -> list[str]:
        """What contradicts latents of all tokens. It must be said before bases are fitted."""
        problems = []
        if self.bases is not None and self.keep not in (None, 1):
            problems.append("bases have a ratio of their own; leave keep out")
        if self.profile is not None:
            problems.append("bases have a ratio of their own; leave profile out")
        if self.min_blocks != 1:
            problems.append(f"{self.policy} keeps every token; leave min_blocks out")
        return problems

    @property
    def bases(self) -> str | None:
        """The file of bases among the policy's own settings; None: it names none."""
        return (self.model_extra or {}).get("bases")

    @property
    def capabilities(self) -> Capabilities | None:
        """What the policy needs and offers; None: there is no such policy (``build`` says so)."""
        policy = policies().get(self.policy)
        return None if policy is None else policy.capabilities

    @property
    def latents(self) -> bool:
        """Whether kept blocks hold latents of all tokens, not chosen tokens."""
        return self.capabilities is not None and self.capabilities.content == "latents"

    @property
    def keeps_latents(self) -> bool:
        """Whether this engine's blocks come to hold latents: at keep 1 they never do."""
        return self.latents and self.keep != 1

    @property
    def gpu_block_size(self) -> int | None:
        """Tokens per block on a GPU, where the user chose none; None: vLLM's."""
        return 64 if self.keeps_latents else None

    def build(self) -> Policy:
        """The policy with its own settings; CompressError lists what is wrong with them."""
        return build_policy(self.policy, dict(self.model_extra or {}))


class Settings(BaseModel):
    """``compress``: one section per kind of compression, and what is measured of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: WeightSettings | None = None
    kv: KVSettings | None = None
    diffusion: DiffusionSettings | None = None
    metrics: bool = Field(
        True,
        description="false: no series of this plugin on /metrics. Then ranks other than the first "
        "need not answer in each step",
    )


def parse_settings(additional_config: Any) -> Settings:
    """Validate the ``compress`` section.

    Args:
        additional_config: ``--additional-config``. Sections of other plugins in it are left alone.

    Returns:
        The settings; all of them None where there is no section.

    Raises:
        CompressError: lists every problem, also a section under a name that is nearly ours.
    """
    given = additional_config if isinstance(additional_config, dict) else {}
    problems = _misplaced(given)
    section = given.get(KEY, {})
    if not isinstance(section, dict):
        problems.append(f"--additional-config {KEY} must be an object, got {section!r}")
    if problems:
        raise joined(problems)
    try:
        return Settings(**section)
    except ValidationError as error:
        for line in explain(error, KEY, list(Settings.model_fields)):
            moved = [name for name in KVSettings.model_fields if f"setting {name!r}" in line]
            hint = f"; it is a setting of {KEY}.kv, move it there" if moved else ""
            problems.append(line + hint)
        raise joined(problems) from error


def method_problems(additional_config: Any, quantization: str | None) -> list[str]:
    """List what is wrong with the settings of a weight method in the ``compress`` section.

    Args:
        additional_config: as in ``parse_settings``, which lists what is wrong beside them.
        quantization: ``--quantization``, which may be no method of this plugin.
    """
    section = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    weights = section.get("weights") if isinstance(section, dict) else None
    if not isinstance(weights, dict) or quantization not in {m.name for m in served_methods()}:
        return []
    try:
        WeightSettings(**weights).request(str(quantization), tensor_parallel=1)
    except ValidationError:  # of the section: ``parse_settings`` lists it
        return []
    except CompressError as error:
        return error.problems
    return []


def _misplaced(given: dict[str, Any]) -> list[str]:
    """List sections that were meant for this plugin, but are misspelt or in another place.

    Other plugins keep sections here too, also under real words such as ``compressor`` and
    ``weights``. Such a section is therefore left alone, unless its content looks like ours.
    """
    if not given.keys() - {KEY}:
        return []
    sections = {
        "weights": _fields(WeightSettings, methods),
        "kv": _fields(KVSettings, policies),
        "diffusion": _fields(DiffusionSettings, diffusion_policies),
    }
    every = set(sections).union(*sections.values())
    problems = []
    for key, content in given.items():
        if key == KEY:
            continue
        name = str(key)
        word = name.lower()
        alike = SequenceMatcher(None, word, KEY).ratio()
        typo = alike > 0.85 and (word == KEY or KEY not in word)  # not compressor, decompress
        if typo or (alike > 0.6 and _looks_like_ours(content, every)):
            problems.append(f"--additional-config has {name!r}; did you mean {KEY!r}?")
        elif name in sections and _looks_like_ours(content, sections[name]):
            problems.append(
                f"--additional-config has {name!r} at its top level; put it into {KEY!r}: "
                f'{{"{KEY}": {{"{name}": ...}}}}'
            )
    return problems


def _looks_like_ours(content: Any, known: set[str]) -> bool:
    """Whether a section names a policy of ours, or has settings of ours alone."""
    if not isinstance(content, dict):
        return False
    with suppress(CompressError):
        if content.get("policy") in [*policies(), *diffusion_policies()]:
            return True
    settings = content.keys() - {"policy"}  # a key that others use, for policies of theirs
    return bool(settings) and settings <= known


def _fields(base: type[BaseModel], classes: Callable[[], Mapping[str, Any]]) -> set[str]:
    """The settings of a section and of every class that it can name."""
    fields = set(base.model_fields)
    with suppress(CompressError):  # a broken package matters when a class is asked for
        fields.update(*(kind.settings_type.model_fields for kind in classes().values()))
    return fields
