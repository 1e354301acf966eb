# SPDX-License-Identifier: Apache-2.0
"""Load a model as int4. A 16-bit checkpoint is calibrated, or its stored plan reused, and rounded
while it streams in. A checkpoint that we wrote loads as it is, unless it holds NaN.

The plan works on Hugging Face tensors before vLLM fuses and shards them, and hands on the tensors
of a compressed-tensors checkpoint. So what is served is bit for bit what ``vllm-compress quantize``
writes, fused layers and tensor parallelism are vLLM's own affair, and the 16-bit model is never
resident in the engine: beyond the int4 model, a few tensors at a time.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from compress_common.calibration.placement import HOST
from compress_common.calibration.precision import slow_in_16_bit
from compress_common.checkpoints.finite import check_finite
from compress_common.checkpoints.folder import hugging_face_files
from compress_common.checkpoints.loading import release
from compress_common.errors import CompressError
from compress_common.progress import Progress
from compress_common.structure.derive import known_structure
from compress_common.structure.wrapper import language_config
from quant_methods.formats.packing import to_compressed_tensors
from quant_methods.formats.plan import Plan
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from vllm_plugin.progress import bar
from vllm_plugin.quantization.embedding import second_copy_problem
from vllm_plugin.quantization.reload import Source, guard_weights, present_kept, refuse_reload
from vllm_plugin.quantization.source import source_of
from vllm_plugin.quantization.start_limit import start_limit
from vllm_plugin.settings import WeightSettings, parse_settings

logger = init_logger(f"vllm.{__name__}")

LOAD_FORMAT = "compress"


class QuantizedStream:
    """The tensors of a compressed-tensors checkpoint, made from 16-bit ones as they are asked for.

    Args:
        plan: Of the checkpoint.
        tensors: ``(name, tensor)`` as the checkpoint has them.
        dtype: What the model runs in.
        device: Where tensors are rounded.
        needed: Whether the model takes a tensor of the checkpoint, by name. The others are skipped:
            those of other pipeline stages.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        needed: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.plan, self.dtype, self.device = plan, dtype, device
        self.tensors = ((name, tensor) for name, tensor in tensors if needed(name))
        self.expected = [name for name in plan.sources if needed(name)]
        self.started = False  # whether a tensor was handed on
        self._made = self._make()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self  # a pooling model of vLLM's looks at the first tensors, and then goes on

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self._made)

    def _make(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.plan.transform(
            self.tensors, self.dtype, device=self.device, expected=self.expected
        ):
            self.started = True
            if isinstance(value, QuantizedWeight):
                for part, tensor in to_compressed_tensors(value, self.dtype).items():
                    yield f"{name}.{part}", tensor
            else:
                yield name, value


class QuantizingLoader(DefaultModelLoader):
    """``--load-format compress``: set by the config edge, not by users."""

    def __init__(self, load_config: LoadConfig) -> None:
        # Where Hugging Face files exist they are loaded: "auto" prefers Mistral's copy of them.
        super().__init__(replace(load_config, load_format="hf"))
        self.plan: Plan | None = None

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> tuple[str, list[str], bool, str]:
        folder, files, safetensors, index = super()._prepare_weights(*args, **kwargs)
        kept = [str(file) for file in hugging_face_files(map(Path, files))]
        return folder, kept, safetensors, index

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load a model. The plan is obtained first, while no memory is taken by the model."""
        at_load = _quantizes(vllm_config, model_config)
        if at_load:
            self.plan = self._obtain_plan(vllm_config, model_config)
            release(HOST)
        # vLLM changes the class of a model that it serves through transformers; follow it before.
        known_structure(language_config(model_config.hf_config))
        model = super().load_model(vllm_config, model_config, prefix)
        self.plan = None
        release(HOST)
        if at_load:
            guard_weights(model, model_config, vllm_config.quant_config, QuantizedStream)
        return model

    def get_all_weights(  # type: ignore[override]
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the weights as the model takes them.

        Not a generator: vLLM also calls this to reload weights, and what can be refused has to be
        refused before it takes the present ones away.
        """
        config = get_current_vllm_config()
        tensors = super().get_all_weights(model_config, model)
        if not _ours(config, model_config):
            return tensors
        if not _quantizes(config, model_config):
            return _finite(tensors)
        plan = self.plan or self._obtain_plan(config, model_config)
        needed = needed_by(model, plan.copies)
        return QuantizedStream(plan, tensors, model_config.dtype, _device(config), needed)

    def _obtain_plan(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Plan:
        request, quant_config = plan_request(vllm_config), vllm_config.quant_config
        with present_kept(quant_config, model_config):
            checkpoint = source_of(model_config, self._prepare_weights)
            # The config edge has asked already, unless the model was not downloaded yet.
            problem = second_copy_problem(model_config, checkpoint)
            if problem is not None and quant_config.embedding_weights is not None:
                raise CompressError(problem)
            if request.calibrates:
                refuse_reload(checkpoint, quant_config.source)
            started = time.perf_counter()
            first = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
            with bar(disable=not first) as progress:
                device = _device(vllm_config)
                if device.type == "cpu" and slow_in_16_bit():
                    progress = _announced(progress)
                limit = start_limit(vllm_config, request)
                plan, stored = obtain_plan(
                    checkpoint, request, device=device, progress=progress, limit=limit
                )
        quant_config.source = Source.now(checkpoint.digest, model_config)
        _log(plan, stored, time.perf_counter() - started)
        return plan


def plan_request(vllm_config: VllmConfig) -> PlanRequest:
    """Return what the engine asks of ``quant_methods``."""
    settings = parse_settings(vllm_config.additional_config).weights or WeightSettings()
    return settings.request(
        str(vllm_config.model_config.quantization),
        vllm_config.parallel_config.tensor_parallel_size,
    )


def needed_by(model: nn.Module, copies: Mapping[str, str]) -> Callable[[str], bool]:
    """Return what tells whether a pipeline stage takes a tensor of the checkpoint, by name.

    Args:
        model: Of the stage; layers of other stages are placeholders in it.
        copies: As in ``Plan``. A stage with a copy alone needs its source.
    """
    sources = {
        source for copy, source in copies.items() if not is_pp_missing_parameter(copy, model)
    }
    return lambda name: name in sources or not is_pp_missing_parameter(name, model)


def _ours(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether a method of ours serves a model. It does not serve the draft model of an engine."""
    method = getattr(vllm_config.quant_config, "method", None)
    return method is not None and model_config.quantization == method


def _quantizes(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether a model is quantized at load."""
    at_load = getattr(vllm_config.quant_config, "quantizes_at_load", False)
    return at_load and _ours(vllm_config, model_config)


def _finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint that we wrote; refuse NaN, which would serve nonsense."""
    for name, tensor in tensors:
        check_finite(name, tensor)
        yield name, tensor


def _device(vllm_config: VllmConfig) -> torch.device:
    return torch.device(vllm_config.device_config.device or "cpu")


def _announced(progress: Progress) -> Progress:
    """Log once, when a calibration begins, that it is slow on this processor."""
    begun = False

    def announced(step: str, done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            logger.info(
                "calibrating, which takes minutes on a processor without AVX-512 and is done once: "
                "later starts take the plan from the cache"
            )
        begun = True
        progress(step, done, total)

    return announced


def _log(plan: Plan, stored: bool, seconds: float) -> None:
    alpha = plan.report.get("alpha")
    logger.info(
        "%s plan %s in %.1f s: %d linears%s",
        plan.method,
        "from the cache" if stored else "calibrated",
        seconds,
        len(plan.grids),
        "" if alpha is None else f", smoothed with alpha {alpha}",
    )
    if routing := plan.report.get("routing"):
        logger.info(
            "%.1f %% of calibration tokens go to the same experts as before (mean over layers)",
            100 * routing["unchanged"],
        )
    if left := plan.report.get("left_at_16_bit"):
        allocated = (plan.report.get("settings") or {}).get("allocation")
        logger.warning(
            "%s stay at 16 bits in every layer: %sno group size divides their input, or their "
            "outputs do not pack",
            ", ".join(left),
            f"the allocation {allocated} says so, " if allocated else "",
        )
