# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked for, and the key that it is stored by."""

import json
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress_common.calibration.memory import check_memory
from compress_common.calibration.placement import Sizes, chosen_device, sizes_of
from compress_common.calibration.text import SELF, CalibrationSettings
from compress_common.calibration.texts import computed, text_identity
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import joined
from compress_common.store import digest
from compress_common.structure.derive import structure_of
from quant_methods.base import QuantMethod
from quant_methods.formats.plan_file import SCHEMA_VERSION
from quant_methods.registry import build_method


class PlanRequest(BaseModel):
    """Everything besides the checkpoint that decides a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "smoothquant_plus"
    settings: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSettings = CalibrationSettings()

    def build(self) -> QuantMethod:
        """Return the method; CompressError when its name or a setting is not valid."""
        return build_method(self.method, self.settings)

    @property
    def calibrates(self) -> bool:
        """Whether the plan depends on calibration text, and so on the values of all weights."""
        method = self.build()
        return method.capabilities.calibrates or method.settings.rounder().needs_gram

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise CompressError when the request has an allocation of another model."""
        settings = self.build().settings
        if settings.allocation is not None:  # or the weights would be hashed for nothing
            settings.check_model(checkpoint.weights_digest)

    def check_head(self, checkpoint: Checkpoint) -> None:
        """Raise CompressError when the plan needs a language-model head that the model lacks."""
        settings = self.build().settings
        if not (self.calibrates or settings.embeddings != "none") or checkpoint.has_head:
            return
        problems = []
        if self.calibrates and self.calibration.source == SELF:
            problems.append(
                "it samples no calibration text of its own: give a text file (`vllm-compress "
                "quantize --calibration FILE`, at load compress.weights.calibration.source), or "
                "use rtn, which needs none"
            )
        if (use := settings.needs_head) is not None:
            problems.append(use)
        if settings.embeddings != "none":
            problems.append("quantized embeddings were not tested there: set embeddings=none")
        if problems:
            why = f"{checkpoint.folder} has no language-model head, it embeds or classifies; "
            raise joined([why + problem for problem in problems])

    @property
    def tokens(self) -> int:
        """Calibration tokens in all; 0: it does not calibrate."""
        return self.calibration.samples * self.calibration.length if self.calibrates else 0

    def check_memory(self, checkpoint: Checkpoint, device: str | torch.device) -> None:
        """Raise CompressError when this machine has too little memory to make the plan."""
        check_memory(checkpoint, device, calibrates=self.calibrates, states=self.tokens)

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        """Return the bytes of its calibration on a device."""
        config = checkpoint.hf_config
        structure_of(config)  # refuses others
        return sizes_of(config, checkpoint.weight_bytes, self.tokens)

    def chosen_device(self, checkpoint: Checkpoint, device: str) -> str:
        """Return the device that a name, "auto" for one, stands for."""
        return chosen_device(device, partial(self.sizes, checkpoint))

    def key(self, checkpoint: Checkpoint) -> str:
        """Return the key of the plan that is calibrated in the model's own type: see ``keys``."""
        return self.keys(checkpoint, None)[0]

    def keys(self, checkpoint: Checkpoint, *dtypes: torch.dtype | None) -> list[str]:
        """Return keys of the plan: two requests share one exactly when they give one plan.

        Args:
            checkpoint: What is quantized.
            dtypes: For each key, what calibration computes in; None: the model's own type.

        Raises:
            CompressError: The calibration text cannot be read.
        """
        method = self.build()
        content = {
            "schema": SCHEMA_VERSION,
            "method": self.method,
            "revision": method.revision,
            "settings": method.settings.identity(),
        }
        if self.calibrates:
            content |= text_identity(checkpoint, self.calibration)
        return [
            digest(checkpoint.digest, json.dumps(content | computed(dtype), sort_keys=True))
            for dtype in dtypes
        ]
