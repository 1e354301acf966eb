# SPDX-License-Identifier: Apache-2.0
"""Load a model as int4. A 16-bit checkpoint is calibrated (or its cached plan reused) and rounded
while it streams in; one that we wrote loads as it is.

The plan works on Hugging Face tensors before vLLM fuses and shards them, and hands on the tensors
of a compressed-tensors checkpoint. So what is served is bit for bit what ``vllm-compress quantize``
writes, fused layers and tensor parallelism are vLLM's own affair, and the 16-bit model is never
resident in the engine: beyond the int4 model, one tensor at a time.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Generator
from dataclasses import replace

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from quant_methods.checkpoint import Checkpoint, resolve
from quant_methods.grid import QuantizedWeight
from quant_methods.packing import to_compressed_tensors
from quant_methods.plan import Plan
from quant_methods.planning import obtain_plan
from vllm_plugin.progress import bar
from vllm_plugin.settings import WeightSettings, parse_settings

logger = init_logger(f"vllm.{__name__}")

LOAD_FORMAT = "compress"


class QuantisingLoader(DefaultModelLoader):
    """``--load-format compress``: set by the config edge, not by users."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))
        self.plan: Plan | None = None
        self.device = torch.device("cpu")

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        self.device = torch.device(vllm_config.device_config.device or "cpu")
        if getattr(vllm_config.quant_config, "quantises_at_load", False):
            self.plan = self._obtain_plan(vllm_config, model_config)
            _return_free_memory()
        model = super().load_model(vllm_config, model_config, prefix)
        self.plan = None
        _return_free_memory()
        return model

    def _obtain_plan(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Plan:
        settings = parse_settings(vllm_config.additional_config).weights or WeightSettings()
        request = settings.request(
            str(model_config.quantization), vllm_config.parallel_config.tensor_parallel_size
        )
        folder = resolve(model_config.model, model_config.revision, self.load_config.download_dir)
        checkpoint = Checkpoint(folder)
        started = time.perf_counter()
        with bar(disable=get_tensor_model_parallel_rank() != 0) as progress:
            plan, cached = obtain_plan(checkpoint, request, device=self.device, progress=progress)
        plan.require(checkpoint.files)
        logger.info(
            "%s plan %s in %.1f s: alpha %s, %d linears",
            plan.method,
            "from the cache" if cached else "calibrated",
            time.perf_counter() - started,
            plan.report.get("alpha", "-"),
            len(plan.grids),
        )
        return plan

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        if self.plan is None:
            yield from super().get_all_weights(model_config, model)
            return
        dtype = model_config.dtype
        before = after = 0

        def on_device() -> Generator[tuple[str, torch.Tensor], None, None]:
            nonlocal before
            for name, tensor in super(QuantisingLoader, self).get_all_weights(model_config, model):
                before += tensor.numel() * dtype.itemsize
                yield name, tensor.to(self.device)

        for name, value in self.plan.transform(on_device(), dtype):
            if isinstance(value, QuantizedWeight):
                packed = to_compressed_tensors(value, dtype)
                parts = {f"{name}.{part}": tensor for part, tensor in packed.items()}
            else:
                parts = {name: value}
            for part, tensor in parts.items():
                after += tensor.nbytes
                yield part, tensor
        logger.info(
            "Weights: %.1f MiB in %s, %.1f MiB quantised (%.3f)",
            before / 2**20,
            dtype,
            after / 2**20,
            after / max(before, 1),
        )


def _return_free_memory() -> None:
    """Give freed heap pages back to the system: glibc keeps what calibration used."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
