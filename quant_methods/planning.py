# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a cached Plan: load, calibrate, remember."""

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress_common.cache import cache_dir
from compress_common.errors import CompressError
from quant_methods.architecture import architecture_of
from quant_methods.base import Progress, QuantMethod, silent
from quant_methods.blocks import Blocks
from quant_methods.calibration import SELF, CalibrationSettings, calibration_tokens
from quant_methods.checkpoint import Checkpoint
from quant_methods.gptq import compensate
from quant_methods.plan import SCHEMA_VERSION, Plan
from quant_methods.registry import build_method


class PlanRequest(BaseModel):
    """Everything that decides a plan: the method, its settings and the calibration text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "smoothquant_plus"
    settings: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSettings = CalibrationSettings()

    def build(self) -> QuantMethod:
        """The method; CompressError when its name or a setting is not valid."""
        return build_method(self.method, self.settings)

    def key(self, checkpoint: Checkpoint) -> str:
        """The cache key: two requests share one exactly when they give the same plan."""
        method = self.build()
        text = ""
        if self.calibration.source != SELF and Path(self.calibration.source).is_file():
            text = hashlib.sha256(Path(self.calibration.source).read_bytes()).hexdigest()
        content = {
            "schema": SCHEMA_VERSION,
            "revision": method.revision,
            "settings": method.settings.model_dump(),
            "calibration": self.calibration.model_dump(exclude={"source"}),
            "text": text or self.calibration.source,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.method}-{checkpoint.fingerprint()}-{digest}"


def plan_path(checkpoint: Checkpoint, request: PlanRequest) -> Path:
    """Where the plan is cached, whether or not it exists."""
    return cache_dir() / "plans" / f"{request.key(checkpoint)}.safetensors"


def obtain_plan(
    checkpoint: Checkpoint,
    request: PlanRequest,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> tuple[Plan, bool]:
    """The plan for a checkpoint and whether it came from the cache.

    Ranks and processes that ask at once wait for the first: the cache file is locked.
    """
    path = plan_path(checkpoint, request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file():
                return Plan.load(path), True
            plan = _calibrate(checkpoint, request, device, progress)
            plan.save(path)
            return plan, False
    except OSError as error:
        raise CompressError(
            f"cannot write the plan cache {path.parent}: {error.strerror}; set VLLM_COMPRESS_CACHE "
            "to a writable folder with free space"
        ) from error


def _calibrate(
    checkpoint: Checkpoint, request: PlanRequest, device: str | torch.device, progress: Progress
) -> Plan:
    method = request.build()
    config = AutoConfig.from_pretrained(checkpoint.folder)
    arch = architecture_of(config)
    compensates = method.settings.rounding == "gptq"
    if not method.capabilities.calibrates and not compensates:
        with torch.device("meta"):
            return method.plan(Blocks(AutoModelForCausalLM.from_config(config), arch, None))
    progress("load model", 0, 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    tokens = calibration_tokens(request.calibration, model, tokenizer, progress)
    blocks = Blocks(model, arch, tokens, device)
    plan = method.plan(blocks, progress)
    if compensates:
        compensate(plan, blocks, progress)
    plan.report["calibration"] = request.calibration.model_dump() | {"tokens": tokens.numel()}
    plan.report["settings"] = method.settings.model_dump()
    del model, blocks
    gc.collect()
    return plan
