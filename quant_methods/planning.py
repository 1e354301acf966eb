# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a stored Plan: check, load, calibrate, remember."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from compress_common.errors import CompressError
from compress_common.store import Store, digest
from quant_methods.architecture import LINEARS, architecture_of
from quant_methods.base import QuantMethod
from quant_methods.calibration.blocks import Blocks
from quant_methods.calibration.precision import computed_in
from quant_methods.calibration.stages import Stages
from quant_methods.calibration.text import (
    SELF,
    CalibrationSettings,
    check_length,
    file_tokens,
    sampled_tokens,
    start_token,
)
from quant_methods.checkpoint import Checkpoint
from quant_methods.formats.plan import Plan, decoder_problem
from quant_methods.formats.plan_file import SCHEMA_VERSION, load_plan, save_plan
from quant_methods.identity import tensor_digest
from quant_methods.progress import Progress, silent
from quant_methods.registry import build_method
from quant_methods.roundings.blockwise import round_blocks

KIND = "plan"
TEXT_KIND = "calibration-text"
_FILE = "plan.safetensors"


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
            content |= _text_identity(checkpoint, self.calibration)
        return [
            digest(checkpoint.digest, json.dumps(content | _computed(dtype), sort_keys=True))
            for dtype in dtypes
        ]


def obtain_plan(
    checkpoint: Checkpoint,
    request: PlanRequest,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> tuple[Plan, bool]:
    """Return the plan for a checkpoint, and whether it was stored already.

    Ranks and processes that ask at once wait for the first. An interrupted calibration goes on
    from its last finished stage.

    Args:
        checkpoint: What is quantized.
        request: How.
        device: Where decoder blocks are computed.
        progress: Called as the calibration advances.

    Raises:
        CompressError: The checkpoint or the calibration text cannot be used, or nothing can be
            written.
    """
    request.check_model(checkpoint)
    check_decoder(checkpoint)
    store, dtype = Store(), None
    if request.calibrates:
        dtype = computed_in(checkpoint.weight_bytes, device)
    own, key = request.keys(checkpoint, None, dtype)
    if dtype is not None and store.find(KIND, own):
        key = own  # from a processor that needs no other type: all replicas then agree
    stages = Stages(key, store)
    made: list[Plan] = []

    def build(folder: Path) -> None:
        plan = _calibrate(checkpoint, request, stages, device, dtype, progress)
        plan.sources = checkpoint.tensor_digests
        save_plan(plan, folder / _FILE)
        made.append(plan)

    def evict() -> None:
        store.remove(KIND, key)
        checkpoint.forget_digests()

    try:
        folder = store.make(KIND, key, build)
    except OSError as error:
        raise CompressError(
            f"cannot write the plan to {store.root}: {error.strerror or error}; set "
            "VLLM_COMPRESS_CACHE to a writable folder with free space"
        ) from error
    if made:  # the plan is in the store: its parts are not needed any more
        stages.clear()
    plan = made[0] if made else load_plan(folder / _FILE)
    plan.evict = evict
    return plan, not made


def _calibrate(
    checkpoint: Checkpoint,
    request: PlanRequest,
    stages: Stages,
    device: str | torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Plan:
    method, config = request.build(), checkpoint.hf_config
    if not request.calibrates:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
            plan = method.plan(Blocks(network, architecture_of(config), None))
    else:
        check_length(request.calibration, config)
        progress("load model", 0, 1)
        model = load_model(checkpoint, dtype)
        tokens = stored_tokens(checkpoint, request.calibration, model, progress, dtype)
        blocks = calibration_blocks(checkpoint, model, tokens, device, stages, dtype)
        plan = method.plan(blocks, progress)
        if (rounding := method.settings.rounder()).needs_gram and not plan.codes:
            round_blocks(plan, blocks, rounding, progress=progress)
        plan.report["calibration"] = request.calibration.model_dump() | {
            "tokens": tokens.numel(),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        del model, blocks
        gc.collect()
    plan.report["settings"] = method.settings.model_dump()
    quantized = {name.split(".", 3)[3] for name in plan.grids}
    plan.report["left_at_16_bit"] = [name for name in LINEARS if name not in quantized]
    return plan


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise CompressError when the tensors are not those of a decoder that can be quantized."""
    config = checkpoint.hf_config
    prefix = architecture_of(config).layers_prefix
    if problem := decoder_problem(checkpoint.files, prefix, config.num_hidden_layers):
        raise CompressError(f"{checkpoint.folder} cannot be quantized: {problem}")


def calibration_blocks(
    checkpoint: Checkpoint,
    model: Any,
    tokens: torch.Tensor,
    device: str | torch.device,
    stages: Stages,
    dtype: torch.dtype | None,
) -> Blocks:
    """Return the decoder of a loaded model, with calibration tokens.

    Args:
        checkpoint: What the model was loaded from.
        model: As ``load_model`` returns it.
        tokens: int64 [samples, length].
        device: Where decoder blocks are computed.
        stages: Where finished parts are kept.
        dtype: What calibration computes in; None: the model's own type.
    """
    config = checkpoint.hf_config
    served = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
    arch = architecture_of(config)
    return Blocks(model, arch, tokens, device, stages, dtype=dtype and served)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """Return the ``transformers`` model of exactly the checkpoint's files and config.

    Args:
        checkpoint: The files.
        dtype: Of the model; None: its own.
    """
    config = checkpoint.hf_config
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise CompressError(
            f"transformers has no language model for {type(config).__name__} of "
            f"{checkpoint.folder}; int4 needs the Hugging Face config (--config-format hf)"
        ) from error
    state = checkpoint.verified_tensors()
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype or "auto").eval()


def _computed(dtype: torch.dtype | None) -> dict[str, str]:
    """The part of a key that says what calibration computes in; empty for the model's own type."""
    return {} if dtype is None else {"computed": str(dtype)}


def _text_identity(checkpoint: Checkpoint, settings: CalibrationSettings) -> dict[str, Any]:
    """What the calibration tokens depend on besides the weights."""
    if settings.source != SELF:
        return {"tokens": tensor_digest(file_tokens(settings, checkpoint.tokenizer))}
    return settings.model_dump() | {"start": start_token(checkpoint.tokenizer)}


def stored_tokens(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    model: Any,
    progress: Progress,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return calibration tokens, int64 [samples, length]. Sampled text is stored: it is slow.

    Args:
        checkpoint: The model that the text is for.
        settings: Where the text comes from.
        model: The ``transformers`` model of the checkpoint, which samples the text.
        progress: Told of each step of sampling.
        dtype: Of the model; None: its own.

    Raises:
        CompressError: The text cannot be read, or is too short.
    """
    if settings.source != SELF:
        return file_tokens(settings, checkpoint.tokenizer)
    identity = _text_identity(checkpoint, settings) | _computed(dtype)
    key = digest(checkpoint.digest, json.dumps(identity, sort_keys=True))

    def build(folder: Path) -> None:
        tokens = sampled_tokens(settings, model, identity["start"], progress)
        save_file({"tokens": tokens}, folder / "tokens.safetensors")

    folder = Store().make(TEXT_KIND, key, build)
    return load_file(folder / "tokens.safetensors")["tokens"]
