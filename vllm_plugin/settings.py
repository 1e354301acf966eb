# SPDX-License-Identifier: Apache-2.0
"""The ``compress`` section of ``--additional-config``, validated here and only here."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quant_methods.calibration import CalibrationSettings
from quant_methods.errors import CompressError, joined
from quant_methods.planning import PlanRequest
from quant_methods.registry import explain

KEY = "compress"


class WeightSettings(BaseModel):
    """``compress.weights``: these keys, plus those of the method that ``--quantization`` names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    activations: Literal["auto", "bf16", "int8"] = Field(
        "auto",
        description="CPU only. bf16: weights alone are 4-bit. int8: activations are rounded to 8 "
        "bits per token too (AMX). auto: int8 where vLLM's own int4 kernel does so, else bf16",
    )
    calibration: CalibrationSettings = CalibrationSettings()

    def request(self, method: str, tensor_parallel: int) -> PlanRequest:
        """What the loader asks of quant_methods; CompressError when a setting is not valid."""
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


class Settings(BaseModel):
    """``compress``: one section per kind of compression."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: WeightSettings | None = None


def parse_settings(additional_config: Any) -> Settings:
    """The validated ``compress`` section; CompressError lists every problem at once."""
    section = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(section, dict):
        raise CompressError(f"--additional-config {KEY} must be an object, got {section!r}")
    try:
        return Settings(**section)
    except ValidationError as error:
        raise joined(explain(error, KEY, list(Settings.model_fields))) from error
